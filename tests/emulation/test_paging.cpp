// The pagers of a GPU on the emulated runtime: what they refuse, what they count, what is left when
// a call fails, and that they free all they took.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "device/global.cuh"
#include "device/launch.cuh"
#include "device/memory.cuh"
#include "device/stream.cuh"
#include "expect.h"
#include "paging/pagers.h"
#include "paging/window.h"

namespace {

using namespace qlora::cuda;
using emulation::Call;
using emulation::expect;
using emulation::Streams;
using qlora::PagedBuffer;
using qlora::PagedParams;
using qlora::PagedStats;
using qlora::Pager;
using qlora::Status;
using qlora::StatusCode;

constexpr std::int64_t kRange = 8192;  // bytes: whole pages
constexpr std::int64_t kRanges = 6;

// By one warp: there are many of them.
__global__ void increment_kernel(Global<int> x, std::int64_t n) {
  for (std::int64_t i = thread_index(); i < n; i += 32) x.store(i, x.load(i) + 1);
}

Status increment(void* x, void* stream) {
  return launch(increment_kernel, {.grid = 1, .block = 32, .stream = stream},
                Global<int>(static_cast<int*>(x), kRange / 4), kRange / 4);
}

// A buffer of one of the pagers, and the stream of a step.
class Paged {
 public:
  explicit Paged(const Pager& pager, std::int64_t window = 0) : pager_(pager) {
    PagedParams params;
    params.bytes = kRanges * kRange;
    params.window_bytes = window;
    opened = pager.open(params, &buffer_);
    if (opened.ok()) opened = create_stream(&stream);
  }
  Paged(const Paged&) = delete;
  Paged& operator=(const Paged&) = delete;
  ~Paged() {
    pager_.close(buffer_);
    if (stream != nullptr) destroy_stream(stream);
  }

  Status prefetch(std::int64_t i) { return pager_.prefetch(buffer_, i * kRange, kRange, stream); }
  Status acquire(std::int64_t i) {
    return pager_.acquire(buffer_, i * kRange, kRange, stream, &address);
  }
  Status release(std::int64_t i, bool modified = true) {
    return pager_.release(buffer_, i * kRange, kRange, stream, modified);
  }
  Status evict(std::int64_t i) { return pager_.evict(buffer_, i * kRange, kRange, stream); }
  Status evict_all() { return pager_.evict(buffer_, 0, kRanges * kRange, stream); }
  Status settle() { return pager_.settle(buffer_); }
  // One added to every integer of the range.
  Status work(std::int64_t i) {
    Status status = acquire(i);
    if (!status.ok()) return status;
    status = increment(address, stream);
    const Status released = release(i);
    return status.ok() ? released : status;
  }
  PagedStats stats() {
    PagedStats stats;
    expect(pager_.stats(buffer_, &stats).ok(), "stats");
    return stats;
  }
  int* host() {
    void* view = nullptr;
    const Status status = pager_.host_view(buffer_, &view);
    expect(status.ok(), "host_view", status.message);
    return static_cast<int*>(view);
  }
  // Whether all integers of the range are that.
  bool holds(std::int64_t i, int value) {
    const int* values = host() + i * kRange / 4;
    return std::all_of(values, values + kRange / 4, [&](int v) { return v == value; });
  }

  Status opened;
  void* stream = nullptr;
  void* address = nullptr;

 private:
  const Pager& pager_;
  PagedBuffer* buffer_ = nullptr;
};

void expect_code(const Status& status, StatusCode code, const char* what) {
  expect(status.code == code, what, status.ok() ? "(went well)" : status.message);
}

void no_faults(const char* where) {
  for (const std::string& fault : runtime().take_faults()) expect(false, where, fault.c_str());
}

// ---- what is present, and what moved ----

void test_residency(const Pager& pager) {
  Paged paged(pager, 3 * kRange);
  expect(paged.opened.ok(), "open", paged.opened.message);
  expect(paged.stats().resident == 0 && paged.stats().bytes == kRanges * kRange, "empty at first");
  for (std::int64_t i = 0; i < 3; ++i) expect(paged.prefetch(i).ok(), "prefetch");
  expect(paged.prefetch(3).ok(), "prefetch without room");
  expect(paged.stats().moved_in == 3 * kRange, "does nothing");
  for (std::int64_t i = 0; i < 3; ++i) expect(paged.work(i).ok(), "work");
  expect(paged.stats().resident == 3 * kRange, "three are present");
  expect(paged.work(3).ok() && paged.stats().moved_in == 4 * kRange, "work makes room");
  expect(paged.work(2).ok() && paged.stats().moved_in == 4 * kRange, "what is present stays");
  expect(paged.work(0).ok() && paged.stats().moved_in == 5 * kRange, "the oldest was sent away");
  expect(paged.evict(5).ok() && paged.evict_all().ok(), "evict");
  expect(paged.settle().ok() && paged.stats().resident == 0, "nothing is present");
  std::int64_t free = 0, total = 0;
  expect(device_memory(&free, &total).ok() && free == total, "nothing is left on the device");
  expect(paged.work(0).ok(), "work after settle");
  const std::array<int, kRanges> counts{3, 1, 2, 1, 0, 0};
  for (std::int64_t i = 0; i < kRanges; ++i) {
    expect(paged.holds(i, counts[static_cast<std::size_t>(i)]), "all work is there");
  }
  const PagedStats stats = paged.stats();
  expect(stats.moved_out == stats.moved_in && stats.resident == 0, "all came back");
}

void test_only_what_is_modified_is_copied_back() {
  Paged paged(staged_pager());
  expect(paged.acquire(0).ok() && paged.release(0, false).ok(), "a use that reads");
  expect(paged.acquire(1).ok() && paged.release(1, true).ok(), "a use that writes");
  expect(paged.evict_all().ok() && paged.stats().moved_out == kRange, "one range leaves");
}

void test_the_host_writes(const Pager& pager) {
  Paged paged(pager);
  int* const values = paged.host();
  expect(paged.holds(0, 0) && paged.holds(kRanges - 1, 0), "a buffer of zeros");
  expect(paged.work(0).ok(), "work");
  expect(paged.host() == values, "one address every time");
  for (int i = 0; i < kRange / 4; ++i) values[i] = 40;
  expect(paged.work(0).ok() && paged.holds(0, 41), "work finds what the host wrote");
}

// Ranges of several sizes, in a window that holds just those that are used at a time.
void test_sizes(const Pager& pager) {
  PagedParams params;
  params.bytes = 64 * 1024;
  params.window_bytes = 16 * 1024;
  PagedBuffer* buffer = nullptr;
  expect(pager.open(params, &buffer).ok(), "open");
  std::uint64_t state = 1;
  for (int turn = 0; turn < 200; ++turn) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    const std::int64_t begin = static_cast<std::int64_t>(state >> 60) * 4096;
    const std::int64_t bytes = 4 * (1 + begin / 4096 * 60);
    void* address = nullptr;
    const Status status = pager.acquire(buffer, begin, bytes, nullptr, &address);
    expect(status.ok(), "a range of any size", status.message);
    if (!status.ok()) break;
    const std::int64_t n = std::min(bytes, kRange) / 4;
    expect(launch(increment_kernel, {.grid = 1, .block = 32},
                  Global<int>(static_cast<int*>(address), n), n)
               .ok(),
           "work on it");
    expect(pager.release(buffer, begin, bytes, nullptr, true).ok(), "release");
    if (state % 4 == 0) expect(pager.evict(buffer, begin, bytes, nullptr).ok(), "evict");
    PagedStats stats;
    expect(pager.stats(buffer, &stats).ok() && stats.resident <= params.bytes, "stats");
  }
  void* host = nullptr;
  expect(pager.host_view(buffer, &host).ok(), "host_view");
  std::int64_t sum = 0;
  for (int r = 0; r < 16; ++r) sum += static_cast<int*>(host)[r * 1024];
  expect(sum == 200, "every turn was counted");
  pager.close(buffer);
}

// ---- how long the step waited ----

void test_waits(const Pager& pager) {
  runtime().streams().set_schedule(Streams::Schedule::early, 0);
  Paged early(pager);
  expect(early.work(0).ok() && early.stats().waited_ns == 0, "what is early is not waited for");
  runtime().streams().set_schedule(Streams::Schedule::late, 0);
  Paged late(pager);
  expect(late.prefetch(0).ok() && late.work(0).ok(), "work");
  expect(synchronize_stream(late.stream).ok(), "synchronize");
  expect(late.stats().waited_ns == kRange, "a nanosecond a byte of what is late");
  expect(late.work(0).ok() && late.stats().waited_ns == kRange, "and none for what is there");
}

// A copy in goes to another place than the one that a copy out leaves, and waits for none.
void test_directions(const Pager& pager) {
  runtime().streams().set_schedule(Streams::Schedule::late, 0);
  Paged paged(pager, 3 * kRange);
  for (std::int64_t i = 0; i < kRanges; ++i) {
    expect(paged.prefetch(i).ok() && paged.work(i).ok(), "work");
    expect(synchronize_stream(paged.stream).ok(), "synchronize");
    if (i == 0) continue;
    const PagedStats stats = paged.stats();
    expect(stats.resident == (i == 1 ? 2 : 3) * kRange, "what is sent has not left yet");
    expect(paged.evict(i - 1).ok(), "evict");
  }
}

// ---- what they refuse ----

void test_bad_calls(const Pager& pager) {
  Paged paged(pager);
  expect_code(paged.release(0), StatusCode::invalid_argument, "a release of nothing");
  expect(paged.prefetch(0).ok(), "prefetch");
  expect_code(paged.release(0), StatusCode::invalid_argument, "a release of a prefetch");
  expect(paged.acquire(0).ok(), "acquire");
  expect(paged.evict(0).ok() && paged.stats().resident == kRange, "what is acquired stays");
  PagedBuffer* other = nullptr;
  void* address = nullptr;
  PagedParams params;
  params.bytes = 4 * kRange;
  params.window_bytes = kRange;
  expect(pager.open(params, &other).ok(), "open");
  expect_code(pager.host_view(other, &address), StatusCode::ok, "nothing is acquired");
  expect(pager.acquire(other, 0, kRange, nullptr, &address).ok(), "acquire");
  expect_code(pager.host_view(other, &address), StatusCode::invalid_argument, "host_view in use");
  expect_code(pager.acquire(other, kRange / 2, kRange, nullptr, &address),
              StatusCode::invalid_argument, "a range across another");
  expect_code(pager.prefetch(other, 0, kRange / 2, nullptr), StatusCode::invalid_argument,
              "a part of another");
  expect_code(pager.acquire(other, kRange, kRange, nullptr, &address), StatusCode::out_of_memory,
              "more than the window");
  runtime().set_captured(true);
  expect_code(pager.acquire(other, 0, kRange, nullptr, &address), StatusCode::unsupported,
              "a captured graph");
  runtime().set_captured(false);
  pager.close(other);  // with a range acquired, and its copy under way
  pager.close(nullptr);
}

void test_what_the_device_lacks() {
  runtime().set_concurrent_managed_access(false);
  expect_code(managed_pager().supports(0), StatusCode::unsupported, "no managed access");
  expect_code(Paged(managed_pager()).opened, StatusCode::unsupported, "and none is opened");
  expect_code(staged_pager().supports(0), StatusCode::ok, "staged needs none");
  expect(Paged(staged_pager()).work(0).ok(), "and works");
  runtime().set_concurrent_managed_access(true);
  expect_code(managed_pager().supports(0), StatusCode::ok, "managed access");

  runtime().set_device_bytes(4 * kRange);
  expect_code(Paged(managed_pager()).opened, StatusCode::out_of_memory, "more than is free");
  PagedParams params;
  params.bytes = kRanges * kRange;
  params.oversubscribe = true;
  PagedBuffer* buffer = nullptr;
  expect(managed_pager().open(params, &buffer).ok(), "unless it is asked for");
  for (std::int64_t turn = 0; turn < 2 * kRanges; ++turn) {
    void* address = nullptr;
    const std::int64_t begin = turn % kRanges * kRange;
    const Status status = managed_pager().acquire(buffer, begin, kRange, nullptr, &address);
    expect(status.ok() && increment(address, nullptr).ok(), "work", status.message);
    expect(managed_pager().release(buffer, begin, kRange, nullptr, true).ok(), "release");
  }
  managed_pager().close(buffer);
  no_faults("never more on the device than is free");

  {
    Paged paged(staged_pager());
    expect_code(paged.acquire(0), StatusCode::out_of_memory, "no room for the window");
    runtime().set_device_bytes(std::int64_t{1} << 30);
    expect(paged.work(0).ok() && paged.holds(0, 1), "and then there is");
  }
  runtime().set_device_bytes(std::int64_t{1} << 30);
}

// ---- calls that fail ----

// A step over all ranges, each call again until it goes well, as a trainer would after it made
// room; how many did not.
int stubborn_step(Paged& paged) {
  int failed = 0;
  const auto insist = [&](const auto& call) {
    for (int tries = 0; !call().ok(); ++tries) {
      ++failed;
      if (tries == 3) return expect(false, "a call fails for ever");
    }
  };
  for (std::int64_t i = 0; i < kRanges; ++i) {
    if (i + 1 < kRanges) insist([&] { return paged.prefetch(i + 1); });
    insist([&] { return paged.acquire(i); });
    insist([&] { return increment(paged.address, paged.stream); });
    insist([&] { return paged.release(i); });
    if (i > 0) insist([&] { return paged.evict(i - 1); });
  }
  insist([&] { return paged.evict_all(); });
  return failed;
}

void test_every_call_fails_once(const Pager& pager) {
  const std::int64_t before = runtime().alive();
  for (const Call which : {Call::copy, Call::allocation, Call::any}) {
    for (int n = 1, quiet = 0; quiet < 2; ++n) {
      {
        Paged paged(pager, 3 * kRange);
        if (paged.opened.ok()) {
          runtime().fail(which, n);
          const int failed = stubborn_step(paged) + stubborn_step(paged);
          quiet += failed == 0;
          runtime().fail(which, 0);
          for (std::int64_t i = 0; i < kRanges; ++i) {
            expect(paged.holds(i, 2), "no work is lost, and none is done twice");
          }
        }
      }
      expect(runtime().alive() == before, "all is freed");
      no_faults("after a call that failed");
    }
    for (bool opened = false; !opened;) {
      static int n = 0;
      runtime().fail(which, ++n);
      opened = Paged(pager).opened.ok();
      runtime().fail(which, 0);
      if (opened) n = 0;
      expect(runtime().alive() == before, "all is freed where it was not opened");
      no_faults("after an open that failed");
    }
  }
}

void test_many_buffers(const Pager& pager) {
  const std::int64_t before = runtime().alive();
  for (int i = 0; i < 1000; ++i) expect(Paged(pager, 2 * kRange).work(i % kRanges).ok(), "work");
  expect(runtime().alive() == before, "a thousand leave nothing");
}

// ---- places in a window ----

void test_window() {
  Window window;
  window.reset(100);
  const Mark first(&window, [](void*) {}), second(&window, [](void*) {});
  std::vector<Mark> after;
  const auto take = [&](std::int64_t bytes) {
    after.clear();
    return window.take(bytes, &after).value_or(-1);
  };
  expect(take(40) == 0 && take(40) == 40 && take(40) == -1 && after.empty(), "places in order");
  window.give(0, 40, {first});
  expect(take(20) == 80 && after.empty(), "what nobody used comes first");
  window.give(80, 20, {});
  window.give(40, 40, {second});
  expect(take(40) == 0 && after == std::vector{first}, "then what was given back longest ago");
  expect(take(60) == 40 && after.size() == 1 && after[0] == second, "pieces side by side");
  expect(take(1) == -1, "full");
  window.give(20, 60, {first});
  expect(take(20) == 20 && take(10) == 40 && after == std::vector{first}, "parts of a piece");
}

}  // namespace

int main() {
  test_window();
  for (const Pager* pager : {&managed_pager(), &staged_pager()}) {
    for (int seed = -1; seed < 3; ++seed) {
      runtime().streams().set_schedule(seed < 0    ? Streams::Schedule::early
                                       : seed == 0 ? Streams::Schedule::late
                                                   : Streams::Schedule::drawn,
                                       static_cast<std::uint64_t>(std::max(seed, 0)));
      test_residency(*pager);
      test_the_host_writes(*pager);
      test_sizes(*pager);
      test_bad_calls(*pager);
      test_every_call_fails_once(*pager);
      test_what_the_device_lacks();
      test_only_what_is_modified_is_copied_back();
      no_faults("in order");
    }
    test_waits(*pager);
    test_directions(*pager);
    test_many_buffers(*pager);
  }
  no_faults("in order");
  return emulation::report();
}
