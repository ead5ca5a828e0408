// The pager "file": state in a mapped file, which may exceed RAM.
//
// The mapping is shared, so that what is in RAM is the system's page cache, no copy of it, and
// counts for no limit of the process. What limits the rate is less the disk than the system's work
// for each page: ranges of huge pages' size come and go in huge pages, which the system reads, and
// the next one ahead, as they are put into the page table. A smaller range is read ahead by
// prefetch, in pieces, because the system cuts one request short. A range that leaves is first
// handed to the disk, and dropped some evictions later, when that is over as a rule: only what is
// clean and in no page table can be dropped.
//
// What the disk cannot read would be a signal in the middle of a kernel (SIGBUS). Pages are
// therefore put into the page table by acquire, in one call of the system, where it is an error.
#include "paging_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <deque>
#include <unordered_map>

#include "nameless_file.h"

#if !defined(MADV_POPULATE_WRITE)
#define MADV_POPULATE_WRITE 23  // Linux 5.14
#endif

namespace qlora::cpu {
namespace {

constexpr std::int64_t kHugePage = 2 << 20;
constexpr std::int64_t kReadAhead = 128 << 10;  // what Linux reads ahead at most, by default
// Bytes on their way out until one waits for them; of a small buffer a quarter.
constexpr std::int64_t kMostLeaving = 32 << 20;

std::int64_t page_size() {
  static const std::int64_t size = ::sysconf(_SC_PAGESIZE);
  return size;
}

struct Span {  // whole pages
  std::int64_t begin, bytes;
};

enum class Presence : unsigned char { absent, coming, present, leaving };

struct Range {
  Presence presence = Presence::absent;
  bool modified = false;
};

struct Leaving {
  std::int64_t begin, bytes;
};

struct FileBuffer : PagedBuffer {
  int file = -1;
  std::byte* memory = nullptr;
  std::int64_t bytes = 0, mapped = 0;
  std::unordered_map<std::int64_t, Range> ranges;  // by their begin
  std::deque<Leaving> leaving;                     // oldest first
  std::int64_t leaving_bytes = 0;
  PagedStats counts;

  FileBuffer() = default;
  FileBuffer(const FileBuffer&) = delete;
  FileBuffer& operator=(const FileBuffer&) = delete;
  ~FileBuffer() {
    if (memory != nullptr) ::munmap(memory, static_cast<std::size_t>(mapped));
    if (file >= 0) ::close(file);
  }

  // Outwards, so that no page of a range stays; a huge page leaves as a whole or not at all.
  [[nodiscard]] Span pages(std::int64_t begin, std::int64_t n) const {
    const std::int64_t page = is_huge(begin, n) ? kHugePage : page_size();
    const std::int64_t first = begin / page * page;
    const std::int64_t last = (begin + n + page - 1) / page * page;
    return {first, std::min(last, mapped) - first};
  }

  [[nodiscard]] static bool is_huge(std::int64_t begin, std::int64_t n) {
    return n >= kHugePage && begin % kHugePage == 0;
  }

  int advise(Span span, int advice) const {
    return ::madvise(memory + span.begin, static_cast<std::size_t>(span.bytes), advice);
  }
};

FileBuffer& file_of(PagedBuffer* buffer) { return *static_cast<FileBuffer*>(buffer); }

struct Stopwatch {  // adds the time of its life
  std::int64_t& total;
  std::chrono::steady_clock::time_point began = std::chrono::steady_clock::now();

  ~Stopwatch() {
    const auto passed = std::chrono::steady_clock::now() - began;
    total += std::chrono::duration_cast<std::chrono::nanoseconds>(passed).count();
  }
};

std::int64_t resident_bytes(const FileBuffer& buffer, Span span) {
  std::array<unsigned char, 16384> pages;
  const std::int64_t most = static_cast<std::int64_t>(pages.size()) * page_size();
  std::int64_t resident = 0;
  for (std::int64_t done = 0; done < span.bytes; done += most) {
    const std::int64_t n = std::min(most, span.bytes - done);
    if (::mincore(buffer.memory + span.begin + done, static_cast<std::size_t>(n), pages.data())) {
      continue;
    }
    const auto end = pages.begin() + static_cast<std::ptrdiff_t>(n / page_size());
    resident += page_size() * std::count_if(pages.begin(), end, [](auto page) { return page & 1; });
  }
  return resident;
}

void read_ahead(const FileBuffer& buffer, Span span) {
  for (std::int64_t done = 0; done < span.bytes; done += kReadAhead) {
    buffer.advise({span.begin + done, std::min(kReadAhead, span.bytes - done)}, MADV_WILLNEED);
  }
}

// Waits for the disk to have it, and drops it.
Status drop(FileBuffer& buffer, Span span) {
  {
    const Stopwatch watch{buffer.counts.waited_ns};
    if (::sync_file_range(buffer.file, span.begin, span.bytes,
                          SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE |
                              SYNC_FILE_RANGE_WAIT_AFTER) != 0) {
      return {StatusCode::device, "the disk did not take what was paged out"};
    }
  }
  buffer.advise(span, MADV_DONTNEED);
  ::posix_fadvise(buffer.file, span.begin, span.bytes, POSIX_FADV_DONTNEED);
  return {};
}

Status drop_oldest(FileBuffer& buffer) {
  const Leaving oldest = buffer.leaving.front();
  const Status status = drop(buffer, buffer.pages(oldest.begin, oldest.bytes));
  if (!status.ok()) return status;
  buffer.leaving.pop_front();
  buffer.leaving_bytes -= oldest.bytes;
  buffer.ranges.erase(oldest.begin);
  return {};
}

// It is needed again before it has left.
void keep(FileBuffer& buffer, std::int64_t begin, std::int64_t bytes) {
  std::erase_if(buffer.leaving, [&](const Leaving& each) { return each.begin == begin; });
  buffer.leaving_bytes -= bytes;
}

Status supports(int) { return {}; }

Status open(const PagedParams& params, PagedBuffer** result) {
  auto* const buffer = new FileBuffer;
  buffer->bytes = buffer->counts.bytes = params.bytes;
  buffer->mapped = (params.bytes + page_size() - 1) / page_size() * page_size();
  const Status status = open_nameless_file(params.directory, buffer->mapped, &buffer->file);
  if (!status.ok()) {
    delete buffer;
    return status;
  }
  void* const memory = ::mmap(nullptr, static_cast<std::size_t>(buffer->mapped),
                              PROT_READ | PROT_WRITE, MAP_SHARED, buffer->file, 0);
  if (memory == MAP_FAILED) {
    const int error = errno;
    delete buffer;
    errno = error;
    if (error == ENOMEM || error == EAGAIN) {
      return {StatusCode::out_of_memory, "there is no address space left to map its file into"};
    }
    return {StatusCode::unsupported, "its file system maps no files into memory"};
  }
  buffer->memory = static_cast<std::byte*>(memory);
  // A wish: where the system or the file system has none, small pages do.
  buffer->advise({0, buffer->mapped}, MADV_HUGEPAGE);
  *result = buffer;
  return {};
}

void close(PagedBuffer* buffer) { delete static_cast<FileBuffer*>(buffer); }

Status host_view(PagedBuffer* buffer, void** address) {
  *address = file_of(buffer).memory;
  return {};
}

Status prefetch(PagedBuffer* paged, std::int64_t begin, std::int64_t bytes, void*) {
  FileBuffer& buffer = file_of(paged);
  Range& range = buffer.ranges[begin];
  if (range.presence == Presence::absent) {
    const Span span = buffer.pages(begin, bytes);
    const std::int64_t missing = span.bytes - resident_bytes(buffer, span);
    buffer.counts.moved_in += missing;
    if (missing > 0 && !FileBuffer::is_huge(begin, bytes)) read_ahead(buffer, span);
    range.presence = Presence::coming;
  } else if (range.presence == Presence::leaving) {
    keep(buffer, begin, bytes);
    range.presence = Presence::present;
  }
  return {};
}

Status acquire(PagedBuffer* paged, std::int64_t begin, std::int64_t bytes, void* stream,
               void** address) {
  FileBuffer& buffer = file_of(paged);
  if (Status status = prefetch(paged, begin, bytes, stream); !status.ok()) return status;
  Range& range = buffer.ranges[begin];
  if (range.presence == Presence::coming) {
    const Stopwatch watch{buffer.counts.waited_ns};
    // EINVAL: an older system, which puts pages in place as they are touched.
    if (buffer.advise(buffer.pages(begin, bytes), MADV_POPULATE_WRITE) != 0 && errno != EINVAL) {
      return {StatusCode::device, "the disk did not give back what was paged out"};
    }
    range.presence = Presence::present;
  }
  *address = buffer.memory + begin;
  return {};
}

Status release(PagedBuffer* paged, std::int64_t begin, std::int64_t, void*, bool modified) {
  file_of(paged).ranges[begin].modified |= modified;
  return {};
}

Status evict(PagedBuffer* paged, std::int64_t begin, std::int64_t bytes, void*) {
  FileBuffer& buffer = file_of(paged);
  Range& range = buffer.ranges[begin];
  if (range.presence == Presence::leaving) return {};
  const Span span = buffer.pages(begin, bytes);
  {
    const Stopwatch watch{buffer.counts.waited_ns};  // a disk with much to do takes no more
    ::sync_file_range(buffer.file, span.begin, span.bytes, SYNC_FILE_RANGE_WRITE);
  }
  if (range.modified) buffer.counts.moved_out += bytes;
  range = {Presence::leaving, false};
  buffer.leaving.push_back({begin, bytes});
  buffer.leaving_bytes += bytes;
  while (buffer.leaving_bytes > std::min(kMostLeaving, buffer.bytes / 4)) {
    if (Status status = drop_oldest(buffer); !status.ok()) return status;
  }
  return {};
}

Status settle(PagedBuffer* paged) {
  FileBuffer& buffer = file_of(paged);
  while (!buffer.leaving.empty()) {
    if (Status status = drop_oldest(buffer); !status.ok()) return status;
  }
  // What the host looked at, too: it may lie in pages that no range covers as a whole.
  return buffer.ranges.empty() ? drop(buffer, {0, buffer.mapped}) : Status{};
}

Status stats(PagedBuffer* paged, PagedStats* result) {
  const FileBuffer& buffer = file_of(paged);
  *result = buffer.counts;
  result->resident = std::min(buffer.bytes, resident_bytes(buffer, {0, buffer.mapped}));
  return {};
}

}  // namespace

const Pager& file_pager() {
  static constexpr Pager pager{
      .name = "file",
      .on_device = false,
      .supports = supports,
      .open = open,
      .close = close,
      .host_view = host_view,
      .prefetch = prefetch,
      .acquire = acquire,
      .release = release,
      .evict = evict,
      .settle = settle,
      .stats = stats,
  };
  return pager;
}

}  // namespace qlora::cpu
