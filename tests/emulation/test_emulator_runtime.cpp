// The emulated runtime: work on streams, in each order that events allow, and what it finds where
// an event or a wait is missing.
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "device/global.cuh"
#include "device/launch.cuh"
#include "device/memory.cuh"
#include "device/stream.cuh"
#include "expect.h"

namespace {

using namespace qlora::cuda;
using emulation::Call;
using emulation::expect;
using emulation::expect_fault;
using emulation::Streams;
using qlora::Status;
using qlora::StatusCode;

constexpr std::int64_t kChunk = 8192;  // bytes: whole pages, which move alone
constexpr int kChunks = 5;
constexpr int kSlots = 3;
constexpr int kInts = kChunk / 4;

__global__ void double_kernel(Global<int> x, int first) {
  const int i = first + static_cast<int>(block_index()) * 256 + thread_index();
  if (i < first + kInts) x.store(i, 2 * x.load(i));
}

Status double_it(void* x, std::int64_t bytes, int first, void* stream) {
  return launch(double_kernel, {.grid = (kInts + 255) / 256, .block = 256, .stream = stream},
                Global<int>(static_cast<int*>(x), bytes / 4), first);
}

// ---- chunks through a window, the right way and one line wrong ----

enum class Mutant {
  none,
  no_wait_for_arrival,
  recorded_before_copy,
  recorded_on_other_stream,
  no_wait_for_use,
  no_wait_for_place,
  no_wait_at_end,
};

// The first thing that fails.
class Chain {
 public:
  Chain& operator<<(const Status& status) {
    if (first_.ok() && !status.ok()) {
      text_ = status.message;
      first_ = {status.code, text_.c_str()};
    }
    return *this;
  }
  [[nodiscard]] const Status& first() const { return first_; }

 private:
  Status first_;
  std::string text_;
};

// Doubles all of the host's integers by copies in, kernels and copies out on three streams.
template <Mutant kMutant>
Status double_all(Chain& chain, bool managed) {
  const std::int64_t bytes = kChunk * kChunks;
  void *step = nullptr, *in = nullptr, *out = nullptr, *host = nullptr, *window = nullptr;
  chain << create_stream(&step) << create_stream(&in) << create_stream(&out);
  if (managed) {
    chain << allocate_managed(bytes, &host) << keep_on_host(host, bytes, 0);
  } else {
    chain << allocate_pinned(bytes, &host) << allocate_device(kSlots * kChunk, &window);
  }
  std::array<void*, kChunks> arrived{}, used{}, left{};
  for (int i = 0; i < kChunks; ++i) {
    for (auto* events : {&arrived, &used, &left}) {
      chain << create_event(&(*events)[static_cast<std::size_t>(i)], false);
    }
  }
  chain << host_uses(host, bytes);
  auto* const values = static_cast<int*>(host);
  for (int i = 0; i < kInts * kChunks; ++i) values[i] = i;
  for (int i = 0; i < kChunks && chain.first().ok(); ++i) {
    const auto n = static_cast<std::size_t>(i);
    char* const there = static_cast<char*>(host) + i * kChunk;
    char* const place = managed ? there : static_cast<char*>(window) + i % kSlots * kChunk;
    if (!managed && i >= kSlots && kMutant != Mutant::no_wait_for_place) {
      chain << wait_event(in, left[n - kSlots]);
    }
    if (kMutant == Mutant::recorded_before_copy) chain << record_event(arrived[n], in);
    chain << (managed ? prefetch_to_device(there, kChunk, 0, in)
                      : copy_to_device(place, there, kChunk, in));
    if (kMutant != Mutant::recorded_before_copy) {
      chain << record_event(arrived[n], kMutant == Mutant::recorded_on_other_stream ? out : in);
    }
    if (kMutant != Mutant::no_wait_for_arrival) chain << wait_event(step, arrived[n]);
    chain << (managed ? double_it(host, bytes, i * kInts, step)
                      : double_it(window, kSlots * kChunk, i % kSlots * kInts, step));
    chain << record_event(used[n], step);
    if (kMutant != Mutant::no_wait_for_use) chain << wait_event(out, used[n]);
    chain << (managed ? prefetch_to_host(there, kChunk, out)
                      : copy_to_host(there, place, kChunk, out));
    chain << record_event(left[n], out);
  }
  if (kMutant != Mutant::no_wait_at_end) chain << synchronize_stream(out);
  chain << host_uses(host, bytes);
  int wrong = 0;
  for (int i = 0; i < kInts * kChunks; ++i) wrong += values[i] != 2 * i;
  if (kMutant == Mutant::none && chain.first().ok()) expect(wrong == 0, "every integer is doubled");
  chain << synchronize_device();
  for (const auto& events : {arrived, used, left}) {
    for (void* event : events) destroy_event(event);
  }
  for (void* stream : {step, in, out}) destroy_stream(stream);
  free_pinned(host);  // managed or pinned: of one kind here
  free_device(window);
  expect(runtime().alive() == 0, "all is freed");
  return chain.first();
}

template <Mutant kMutant>
void must_be_found(bool managed, const char* what) {
  Chain chain;
  expect_fault(double_all<kMutant>(chain, managed), "race between streams", what);
  expect(!runtime().take_faults().empty(), "a fault is kept");
}

void each_schedule(const auto& test) {
  test(Streams::Schedule::early, 0);
  test(Streams::Schedule::late, 0);
  for (std::uint64_t seed = 1; seed < 7; ++seed) test(Streams::Schedule::drawn, seed);
}

void test_chunks_and_mutants() {
  each_schedule([](Streams::Schedule schedule, std::uint64_t seed) {
    runtime().streams().set_schedule(schedule, seed);
    for (const bool managed : {false, true}) {
      Chain chain;
      const Status status = double_all<Mutant::none>(chain, managed);
      expect(status.ok(), "chunks in order", status.message);
      expect(runtime().take_faults().empty(), "and no fault");
      must_be_found<Mutant::no_wait_for_arrival>(managed, "no wait for what arrives");
      must_be_found<Mutant::recorded_before_copy>(managed, "an event recorded before its copy");
      must_be_found<Mutant::recorded_on_other_stream>(managed, "an event on another stream");
      must_be_found<Mutant::no_wait_for_use>(managed, "no wait for the kernel");
      must_be_found<Mutant::no_wait_at_end>(managed, "no wait of the host");
    }
    must_be_found<Mutant::no_wait_for_place>(false, "no wait for the place");
  });
}

// ---- what a schedule does ----

void test_schedules() {
  void *stream = nullptr, *other = nullptr, *host = nullptr, *device = nullptr;
  void *begin = nullptr, *end = nullptr, *never = nullptr;
  Chain chain;
  runtime().streams().set_schedule(Streams::Schedule::late, 0);
  chain << create_stream(&stream) << create_stream(&other) << allocate_pinned(kChunk, &host)
        << allocate_device(kChunk, &device) << create_event(&begin, true)
        << create_event(&end, true) << create_event(&never, true);
  auto* const values = static_cast<int*>(host);
  chain << host_uses(host, kChunk);
  values[0] = 7;
  chain << record_event(begin, stream) << copy_to_device(device, host, kChunk, stream)
        << record_event(end, stream);
  bool done = true;
  chain << is_done(end, &done);
  expect(!done && *static_cast<int*>(device) != 7, "late: nothing is done that nobody waits for");
  std::int64_t ns = 0;
  expect(!elapsed_ns(begin, end, &ns).ok(), "no time before it is done");
  chain << wait_event(other, end) << synchronize_stream(other) << is_done(end, &done);
  expect(done && *static_cast<int*>(device) == 7, "a wait of another stream does it");
  chain << elapsed_ns(begin, end, &ns);
  expect(ns == kChunk, "a copy takes a nanosecond a byte");
  chain << is_done(never, &done);
  expect(done, "an event that was never recorded is done");
  runtime().streams().set_schedule(Streams::Schedule::early, 0);
  values[0] = 8;
  chain << copy_to_device(device, host, kChunk, stream);
  expect(*static_cast<int*>(device) == 8, "early: at once");
  chain << synchronize_stream(stream);
  for (void* event : {begin, end, never}) destroy_event(event);
  for (void* each : {stream, other}) destroy_stream(each);
  free_device(device);
  free_pinned(host);
  expect(chain.first().ok(), "no call fails", chain.first().message);
  expect(runtime().take_faults().size() == 1, "one fault: the time that was not there");
}

// ---- managed memory, what it has room for, and calls that fail ----

void test_managed_memory() {
  const std::int64_t page = emulation::Allocation::kPageBytes;
  void* memory = nullptr;
  Chain chain;
  runtime().set_device_bytes(4 * page);
  chain << allocate_managed(8 * page, &memory) << host_uses(memory, 8 * page);
  expect_fault(double_it(memory, 8 * page, 0, nullptr), "page fault", "no prefetch at all");
  chain << synchronize_device() << host_uses(memory, 8 * page);
  std::int64_t free = 0, total = 0;
  chain << prefetch_to_device(memory, 3 * page - 1, 0, nullptr) << device_memory(&free, &total);
  expect(free == page && total == 4 * page, "a prefetch takes whole pages");
  void* window = nullptr;
  const Status full = allocate_device(page + 1, &window);
  expect(full.code == StatusCode::out_of_memory, "what is prefetched is not free");
  expect(runtime().take_faults().size() == 1, "a page fault, and a full device is none");
  chain << prefetch_to_device(static_cast<char*>(memory) + 3 * page, 2 * page, 0, nullptr);
  const auto faults = runtime().take_faults();
  expect(faults.size() == 1 && faults[0].find("more memory") != std::string::npos,
         "a prefetch of more than is free is a fault");
  chain << synchronize_device() << host_uses(memory, 8 * page) << device_memory(&free, &total);
  expect(free == total, "pages go where the host touches them");
  runtime().set_concurrent_managed_access(false);
  expect(!prefetch_to_device(memory, page, 0, nullptr).ok(), "no prefetch without the attribute");
  runtime().set_concurrent_managed_access(true);
  runtime().set_device_bytes(std::int64_t{1} << 30);
  free_managed(memory);
  expect(chain.first().ok(), "no other call fails", chain.first().message);
  expect(runtime().take_faults().empty(), "and no other fault");
}

void test_misuse() {
  void *host = nullptr, *device = nullptr, *event = nullptr;
  Chain chain;
  chain << allocate_pinned(kChunk, &host) << allocate_device(kChunk, &device)
        << create_event(&event, false);
  std::vector<char> pageable(kChunk);
  expect_fault(copy_to_device(device, pageable.data(), kChunk, nullptr), "runtime misuse",
               "a copy from memory that is not pinned");
  expect_fault(copy_to_device(device, host, kChunk + 1, nullptr), "runtime misuse",
               "a copy past the end");
  expect_fault(prefetch_to_device(host, kChunk, 0, nullptr), "runtime misuse",
               "a prefetch of pinned memory");
  expect_fault(double_it(host, kChunk, 0, nullptr), "runtime misuse", "a kernel on pinned memory");
  expect_fault(record_event(host, nullptr), "runtime misuse", "no such event");
  expect_fault(synchronize_stream(host), "runtime misuse", "no such stream");
  chain << copy_to_device(device, host, kChunk, nullptr);
  static_cast<void>(runtime().take_faults());
  free_device(device);
  const auto faults = runtime().take_faults();
  expect(faults.size() == 1 && faults[0].starts_with("race between streams"),
         "memory freed under a copy");
  chain << synchronize_device();
  free_pinned(host);
  destroy_event(event);
  free_pinned(host);
  expect(runtime().take_faults().size() == 1, "memory freed twice");
  expect(chain.first().ok(), "no other call fails", chain.first().message);
}

void test_calls_that_fail() {
  for (int n = 1;; ++n) {
    runtime().fail(Call::copy, n);
    Chain chain;
    const Status status = double_all<Mutant::none>(chain, true);
    static_cast<void>(runtime().take_faults());
    if (status.ok()) {
      expect(n == 2 * kChunks + 1, "every prefetch failed once");
      break;
    }
  }
  runtime().fail(Call::allocation, 2);
  Chain chain;
  void *first = nullptr, *second = nullptr, *third = nullptr;
  chain << allocate_pinned(1, &first);
  expect(allocate_device(1, &second).code == StatusCode::out_of_memory, "the second allocation");
  chain << allocate_device(1, &third);
  free_pinned(first);
  free_device(third);
  runtime().fail(Call::any, 0);
  expect(chain.first().ok(), "and no other", chain.first().message);
}

}  // namespace

int main() {
  test_chunks_and_mutants();
  test_schedules();
  test_managed_memory();
  test_misuse();
  test_calls_that_fail();
  return emulation::report();
}
