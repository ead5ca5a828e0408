// The pager "file": what was written comes back whatever was evicted in between, what it says of
// residency is true, what cannot be is an error, and nothing is left behind.
#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <string>

#include "qlora_native/paging.h"
#include "support.h"

namespace {

// What a file system may refuse that the machine of the test has none of: errors to give, or 0.
int mmap_error = 0, fallocate_error = 0;

}  // namespace

// In place of the C library's, for this program.
extern "C" {

void* mmap(void* at, std::size_t bytes, int protection, int flags, int file, off_t begin) noexcept {
  if (mmap_error != 0 && (flags & MAP_SHARED) != 0) {
    errno = mmap_error;
    return MAP_FAILED;
  }
  return reinterpret_cast<void*>(
      ::syscall(SYS_mmap, at, bytes, protection, flags, file, begin));  // NOLINT: an address
}

int posix_fallocate(int file, off_t begin, off_t bytes) {
  if (fallocate_error != 0) return fallocate_error;
  return ::syscall(SYS_fallocate, file, 0, begin, bytes) == 0 ? 0 : errno;
}
}

namespace {

using namespace qlora;
using namespace qlora::test;

const Pager& pager_of_files() { return *find_pager("file"); }

struct Directory {
  std::string path;

  Directory() : path("/var/tmp/paging_file.XXXXXX") {
    if (::mkdtemp(path.data()) == nullptr) fail("no directory for the test");
  }
  ~Directory() { ::rmdir(path.c_str()); }
  Directory(const Directory&) = delete;
  Directory& operator=(const Directory&) = delete;
};

void expect(bool holds, const char* what) {
  count_case();
  if (!holds) fail("%s", what);
}

void expect_ok(const Status& status) {
  count_case();
  if (!status.ok()) fail("%s (errno %d)", status.message, errno);
}

// Chunks of odd sizes, in an order of their own each time, some of them evicted.
void test_content(const char* directory) {
  constexpr std::int64_t kChunk = 3 * 4096 + 256, kChunks = 37;
  constexpr std::int64_t kBytes = kChunk * kChunks - 129;
  const Pager& pager = pager_of_files();
  PagedBuffer* buffer = nullptr;
  expect_ok(pager.open({.bytes = kBytes, .directory = directory}, &buffer));
  Random random;
  std::vector<std::uint8_t> added(kChunks, 0);
  for (int step = 0; step < 200; ++step) {
    const std::int64_t i = random.bits() % kChunks;
    const std::int64_t begin = i * kChunk, bytes = std::min(kChunk, kBytes - begin);
    if (random.bits() % 2 == 0) expect_ok(pager.prefetch(buffer, begin, bytes, nullptr));
    void* address = nullptr;
    expect_ok(pager.acquire(buffer, begin, bytes, nullptr, &address));
    auto* const values = static_cast<std::uint8_t*>(address);
    const std::uint8_t wanted = added[static_cast<std::size_t>(i)];
    for (std::int64_t j = 0; j < bytes; ++j) {
      if (values[j] != wanted) fail("chunk %lld differs", number(i));
      ++values[j];
    }
    ++added[static_cast<std::size_t>(i)];
    expect_ok(pager.release(buffer, begin, bytes, nullptr, true));
    if (random.bits() % 3 != 0) expect_ok(pager.evict(buffer, begin, bytes, nullptr));
    if (random.bits() % 16 == 0) expect_ok(pager.settle(buffer));
  }
  void* view = nullptr;
  expect_ok(pager.host_view(buffer, &view));
  const auto* const values = static_cast<const std::uint8_t*>(view);
  for (std::int64_t j = 0; j < kBytes; ++j) {
    if (values[j] != added[static_cast<std::size_t>(j / kChunk)]) fail("byte %lld", number(j));
  }
  pager.close(buffer);
}

std::int64_t resident_by_mincore(void* address, std::int64_t bytes) {
  const std::int64_t page = ::sysconf(_SC_PAGESIZE);
  std::vector<unsigned char> pages(static_cast<std::size_t>(bytes / page));
  if (::mincore(address, static_cast<std::size_t>(bytes), pages.data()) != 0) return -1;
  std::int64_t resident = 0;
  for (const unsigned char each : pages) resident += (each & 1) * page;
  return resident;
}

void test_residency(const char* directory) {
  constexpr std::int64_t kChunk = 1 << 20, kBytes = 8 * kChunk;  // of small pages
  const Pager& pager = pager_of_files();
  PagedBuffer* buffer = nullptr;
  expect_ok(pager.open({.bytes = kBytes, .directory = directory}, &buffer));
  void* view = nullptr;
  expect_ok(pager.host_view(buffer, &view));
  const auto check = [&](std::int64_t least, std::int64_t most) {
    PagedStats stats;
    expect_ok(pager.stats(buffer, &stats));
    expect(stats.resident == resident_by_mincore(view, kBytes), "residency is not mincore's");
    expect(stats.resident >= least && stats.resident <= most, "residency is off");
    return stats;
  };
  check(0, 0);
  void* address = nullptr;
  for (std::int64_t begin = 0; begin < kBytes; begin += kChunk) {
    expect_ok(pager.acquire(buffer, begin, kChunk, nullptr, &address));
    std::memset(address, 1, kChunk);
    expect_ok(pager.release(buffer, begin, kChunk, nullptr, true));
  }
  check(kBytes, kBytes);
  for (std::int64_t begin = 0; begin < kBytes / 2; begin += kChunk) {
    expect_ok(pager.evict(buffer, begin, kChunk, nullptr));
    expect_ok(pager.evict(buffer, begin, kChunk, nullptr));  // twice is once
  }
  expect_ok(pager.settle(buffer));
  const PagedStats half = check(kBytes / 2, kBytes / 2);
  expect(half.moved_out == kBytes / 2, "half of it was moved out");
  expect_ok(pager.prefetch(buffer, 0, kChunk, nullptr));
  expect_ok(pager.acquire(buffer, 0, kChunk, nullptr, &address));
  expect(static_cast<const char*>(address)[kChunk - 1] == 1, "what came back differs");
  expect_ok(pager.release(buffer, 0, kChunk, nullptr, false));
  const PagedStats back = check(kBytes / 2 + kChunk, kBytes / 2 + kChunk);
  expect(back.moved_in == half.moved_in + kChunk, "one chunk was moved in");
  expect_ok(pager.evict(buffer, 0, kChunk, nullptr));
  expect_ok(pager.settle(buffer));
  expect(check(kBytes / 2, kBytes / 2).moved_out == kBytes / 2, "what is clean is not moved out");
  pager.close(buffer);
}

// Of huge pages: the system reads one more ahead.
void test_huge_pages(const char* directory) {
  constexpr std::int64_t kHuge = 2 << 20, kChunk = 3 * kHuge, kChunks = 8;
  constexpr std::int64_t kBytes = kChunk * kChunks - kHuge + 4321;
  const Pager& pager = pager_of_files();
  PagedBuffer* buffer = nullptr;
  expect_ok(pager.open({.bytes = kBytes, .directory = directory}, &buffer));
  PagedStats stats;
  for (int step = 0; step < 3; ++step) {
    for (std::int64_t begin = 0; begin < kBytes; begin += kChunk) {
      const std::int64_t bytes = std::min(kChunk, kBytes - begin);
      void* address = nullptr;
      expect_ok(pager.prefetch(buffer, begin, bytes, nullptr));
      expect_ok(pager.acquire(buffer, begin, bytes, nullptr, &address));
      auto* const values = static_cast<std::uint8_t*>(address);
      expect(values[0] == step && values[bytes - 1] == step, "what came back differs");
      std::memset(values, step + 1, static_cast<std::size_t>(bytes));
      expect_ok(pager.release(buffer, begin, bytes, nullptr, true));
      expect_ok(pager.evict(buffer, begin, bytes, nullptr));
    }
    expect_ok(pager.settle(buffer));
    expect_ok(pager.stats(buffer, &stats));
    expect(stats.resident <= 2 * kHuge, "what was evicted stays");
  }
  pager.close(buffer);
}

int entries(const char* directory) {
  DIR* const listing = ::opendir(directory);
  int n = 0;
  while (::readdir(listing) != nullptr) ++n;
  ::closedir(listing);
  return n;
}

void expect_error(const char* directory, std::int64_t bytes, int error, StatusCode code) {
  PagedBuffer* buffer = nullptr;
  errno = 0;
  const Status status = pager_of_files().open({.bytes = bytes, .directory = directory}, &buffer);
  count_case();
  if (status.code != code || errno != error || buffer != nullptr) {
    fail("%s: wanted errno %d, got %d: %s", directory, error, errno, status.message);
  }
}

void test_errors(const std::string& directory) {
  const char* const here = directory.c_str();
  expect_error((directory + "/missing").c_str(), 4096, ENOENT, StatusCode::invalid_argument);
  expect_error("/dev/null", 4096, ENOTDIR, StatusCode::invalid_argument);
  expect_error("/proc", 4096, EOPNOTSUPP, StatusCode::unsupported);
  expect_error(here, std::int64_t{1} << 50, ENOSPC, StatusCode::out_of_memory);
  if (::access("/dev/shm", W_OK) == 0) {
    expect_error("/dev/shm", 4096, EINVAL, StatusCode::invalid_argument);
  }
  if (::geteuid() != 0) {
    ::chmod(here, 0500);
    expect_error(here, 4096, EACCES, StatusCode::invalid_argument);
    ::chmod(here, 0700);
  }

  // Of limits of the process: the size of a file, without its signal; address space; open files.
  rlimit before{};
  const auto limited = [&](auto which, rlim_t most, std::int64_t bytes, int error) {
    ::getrlimit(which, &before);
    const rlimit limit{most, before.rlim_max};
    ::setrlimit(which, &limit);
    expect_error(here, bytes, error, StatusCode::out_of_memory);
    ::setrlimit(which, &before);
  };
  limited(RLIMIT_FSIZE, 1 << 20, 2 << 20, EFBIG);
  limited(RLIMIT_NOFILE, 0, 4096, EMFILE);
#if !defined(__SANITIZE_ADDRESS__)  // which takes terabytes of address space
  limited(RLIMIT_AS, 1 << 20, 4 << 20, ENOMEM);
#endif
}

// As of a FUSE file system with direct_io, or 9p without a cache; a disk, or a quota, that is found
// to be full as the room is reserved.
void test_what_a_file_system_refuses(const char* directory) {
  const int files = entries("/proc/self/fd");
  const auto refused = [&](int& which, int error, StatusCode code) {
    which = error;
    expect_error(directory, 1 << 20, error, code);
    which = 0;
  };
  refused(mmap_error, ENODEV, StatusCode::unsupported);
  refused(fallocate_error, ENOSPC, StatusCode::out_of_memory);
  refused(fallocate_error, EDQUOT, StatusCode::out_of_memory);
  refused(fallocate_error, EIO, StatusCode::device);
  expect(entries("/proc/self/fd") == files, "a file stays open");
  expect(entries(directory) == 2, "a file is left in the directory");
}

// Open files, and pages of address space and of memory.
struct Held {
  long files, address_space, memory;
};

Held held() {
  Held now{entries("/proc/self/fd"), 0, 0};
  std::ifstream("/proc/self/statm") >> now.address_space >> now.memory;
  return now;
}

void test_a_thousand_cycles(const std::string& directory) {
  constexpr std::int64_t kBytes = 1 << 20;
  const Pager& pager = pager_of_files();
  const auto cycle = [&] {
    PagedBuffer* buffer = nullptr;
    expect_ok(pager.open({.bytes = kBytes, .directory = directory.c_str()}, &buffer));
    void* address = nullptr;
    expect_ok(pager.acquire(buffer, 0, kBytes, nullptr, &address));
    static_cast<char*>(address)[kBytes - 1] = 1;
    expect_ok(pager.release(buffer, 0, kBytes, nullptr, true));
    pager.close(buffer);
  };
  for (int i = 0; i < 10; ++i) cycle();
  const Held before = held();
  for (int i = 0; i < 1000; ++i) cycle();
  const Held after = held();
  expect(after.files == before.files, "files stay open");
  expect(after.address_space <= before.address_space + 64, "address space grows");
#if !defined(__SANITIZE_ADDRESS__)  // which gives nothing back for a while
  expect(after.memory <= before.memory + 64, "memory grows");
#endif
  expect(entries(directory.c_str()) == 2, "a file is left in the directory");
}

}  // namespace

int main() {
  const Directory directory;
  test_content(directory.path.c_str());
  test_residency(directory.path.c_str());
  test_huge_pages(directory.path.c_str());
  test_errors(directory.path);
  test_what_a_file_system_refuses(directory.path.c_str());
  test_a_thousand_cycles(directory.path);
  std::printf("%d cases, %d failures\n", cases, failures);
  return failures == 0 ? 0 : 1;
}
