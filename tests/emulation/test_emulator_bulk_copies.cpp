// Bulk copies that report to mbarriers, the fence of proxies, named barriers and registers that
// change hands: the right way, and with one line wrong.
#include <cstdint>
#include <string_view>
#include <vector>

#include "device/bulk_copy.cuh"
#include "device/fence.cuh"
#include "device/global.cuh"
#include "device/launch.cuh"
#include "device/mbarrier.cuh"
#include "device/shared.cuh"
#include "device/warpgroup.cuh"
#include "expect.h"

namespace {

using namespace qlora::cuda;
using emulation::expect;
using emulation::expect_fault;
using qlora::Status;

enum class Mutant {
  none,
  no_fence_after_init,
  expects_nothing,
  expects_too_much,
  one_copy_missing,
  no_wait_for_full,
  wrong_phase_of_full,
  no_barrier_before_refill,
  no_fence_before_refill,
  reads_into_flight,
};

constexpr int kStages = 2;
constexpr int kSteps = 7;
constexpr int kRow = 16;  // ints: 64 bytes
constexpr int kThreads = 64;
constexpr int kStage = kThreads * kRow;

// Each thread copies a row a step, and adds up another thread's.
template <Mutant kMutant>
__global__ void ring_kernel(Global<const int> x, Global<int> sums) {
  __shared__ SharedArray<int, kStages * kStage> ring_array;
  __shared__ SharedArray<Mbarrier, kStages> barrier_array;
  const Shared<int> ring = ring_array.view();
  const Shared<Mbarrier> full = barrier_array.view();
  const int t = thread_index();
  if (t == 0) {
    for (int s = 0; s < kStages; ++s) init_mbarrier(full, s, kThreads);
    if (kMutant != Mutant::no_fence_after_init) fence_async_proxy();
  }
  sync_block();
  const auto copy = [&](int step) {
    if (step >= kSteps) return;
    const int stage = step % kStages;
    const int expected = kMutant == Mutant::expects_nothing    ? 0
                         : kMutant == Mutant::expects_too_much ? 80
                                                               : 64;
    arrive_expecting(full, stage, expected);
    if (kMutant == Mutant::one_copy_missing && step == 3 && t == 9) return;
    bulk_copy(ring, stage * kStage + t * kRow, x, std::int64_t{step} * kStage + t * kRow, kRow,
              full, stage);
    if (kMutant == Mutant::reads_into_flight) sums.store(t, ring.load(stage * kStage + t * kRow));
  };
  for (int step = 0; step < kStages; ++step) copy(step);
  int sum = 0;
  for (int step = 0; step < kSteps; ++step) {
    const int stage = step % kStages;
    const int parity = (step / kStages + (kMutant == Mutant::wrong_phase_of_full ? 1 : 0)) % 2;
    if (kMutant != Mutant::no_wait_for_full) wait_phase(full, stage, parity);
    for (int i = 0; i < kRow; ++i) {
      sum += ring.load(stage * kStage + (t + 7) % kThreads * kRow + i);
    }
    if (kMutant != Mutant::no_fence_before_refill) fence_async_proxy();
    if (kMutant != Mutant::no_barrier_before_refill) sync_named(1, kThreads);
    copy(step + kStages);
  }
  sums.store(block_index() * kThreads + t, sum);
}

template <Mutant kMutant>
Status run_ring(std::vector<int>* result = nullptr) {
  std::vector<int> x(kSteps * kStage + 4), sums(2 * kThreads);
  const std::size_t past = (16 - reinterpret_cast<std::uintptr_t>(x.data()) % 16) % 16 / 4;
  for (int i = 0; i < kSteps * kStage; ++i) x[static_cast<std::size_t>(i) + past] = i * i % 101;
  const Status status = launch(ring_kernel<kMutant>, {.grid = 2, .block = kThreads},
                               Global<const int>(x.data() + past, kSteps * kStage),
                               Global<int>(sums.data(), 2 * kThreads));
  if (result != nullptr) *result = sums;
  return status;
}

// What was not waited for shows as still on its way, as another's write, or as never written.
void expect_too_early(const Status& status, const char* what) {
  const std::string_view message = status.ok() ? "" : status.message;
  const bool raced = message.starts_with("race");
  const bool hangs = message.starts_with("divergent barrier");
  expect_fault(status,
               raced   ? "race"
               : hangs ? "divergent barrier"
                       : "in flight",
               what, "uninitialised");
}

void test_ring_and_mutants() {
  std::vector<int> want(kThreads);
  for (int i = 0; i < kSteps * kStage; ++i) {
    want[static_cast<std::size_t>((i % kStage / kRow + kThreads - 7) % kThreads)] += i * i % 101;
  }
  want.insert(want.end(), want.begin(), want.end());
  for (std::uint64_t seed = 0; seed < 8; ++seed) {
    machine().set_seed(seed);
    std::vector<int> sums;
    const Status status = run_ring<Mutant::none>(&sums);
    expect(status.ok(), "a ring of bulk copies runs", status.message);
    expect(sums == want, "and gives the sums");

    expect_fault(run_ring<Mutant::no_fence_after_init>(), "race",
                 "no fence of proxies after mbarrier.init");
    expect_too_early(run_ring<Mutant::expects_nothing>(), "bytes that nobody expects");
    expect_fault(run_ring<Mutant::expects_too_much>(), "divergent barrier", "too many bytes");
    expect_fault(run_ring<Mutant::one_copy_missing>(), "divergent barrier", "a copy missing");
    expect_too_early(run_ring<Mutant::no_wait_for_full>(), "no wait for full");
    expect_too_early(run_ring<Mutant::wrong_phase_of_full>(), "the other phase of full");
    expect_too_early(run_ring<Mutant::no_barrier_before_refill>(), "a stage filled too early");
    expect_fault(run_ring<Mutant::no_fence_before_refill>(), "race",
                 "a stage filled without a fence of proxies");
    expect_fault(run_ring<Mutant::reads_into_flight>(), "in flight", "a copy read at once");
  }
  machine().set_seed(0);
}

// ---- sizes and places ----

__global__ void place_kernel(Global<const std::uint8_t> x, Global<std::uint8_t> out, int to,
                             int from, int n) {
  __shared__ SharedArray<Mbarrier, 1> barrier;
  const Shared<std::uint8_t> bytes = dynamic_shared<std::uint8_t>(0, 64);
  const Shared<Mbarrier> full = barrier.view();
  init_mbarrier(full, 0, 1);
  fence_async_proxy();
  arrive_expecting(full, 0, n);
  bulk_copy(bytes, to, x, from, n, full, 0);
  wait_phase(full, 0, 0);
  for (int i = 0; i < n; ++i) out.store(i, bytes.load(to + i));
}

Status run_place(int to, int from, int n) {
  alignas(16) std::uint8_t x[64];
  std::vector<std::uint8_t> out(64);
  for (int i = 0; i < 64; ++i) x[i] = static_cast<std::uint8_t>(3 * i);
  const Status status =
      launch(place_kernel, {.grid = 1, .block = 1, .dynamic_shared = 64},
             Global<const std::uint8_t>(x, 64), Global<std::uint8_t>(out.data(), 64), to, from, n);
  for (int i = 0; status.ok() && i < n; ++i) {
    expect(out[static_cast<std::size_t>(i)] == x[from + i], "a bulk copy brings its bytes");
  }
  return status;
}

void test_places() {
  expect(run_place(16, 32, 32).ok(), "a copy from and to multiples of 16");
  expect_fault(run_place(8, 0, 16), "misaligned", "a bulk copy to a multiple of 8");
  expect_fault(run_place(0, 8, 16), "misaligned", "a bulk copy from a multiple of 8");
  expect_fault(run_place(0, 0, 24), "misaligned", "24 bytes");
  expect_fault(run_place(48, 0, 32), "out of bounds", "past the end of shared memory");
  expect_fault(run_place(0, 48, 32), "out of bounds", "past the end of global memory");
}

// ---- named barriers and registers ----

enum class Meeting { right, other_number, one_warp_stays_away };

template <Meeting kMeeting>
__global__ void named_kernel(Global<int> out) {
  __shared__ SharedArray<int, 64> values;
  const int t = thread_index();
  if (warp_index() == 2) return;  // the barrier is not theirs
  values.store(t, t);
  if (kMeeting == Meeting::one_warp_stays_away && warp_index() == 1) return;
  const bool other = kMeeting == Meeting::other_number && warp_index() == 1;
  sync_named(3, other ? 96 : 64);
  out.store(t, values.load((t + 33) % 64));
}

template <int kGiven, int kTaken>
__global__ void registers_kernel() {
  if (warpgroup_index() == 0) {
    give_registers<kGiven>();
  } else {
    take_registers<kTaken>();
  }
}

void test_named_barriers_and_registers() {
  std::vector<int> values(64);
  const Global<int> out(values.data(), 64);
  for (std::uint64_t seed = 0; seed < 4; ++seed) {
    machine().set_seed(seed);
    const Status status = launch(named_kernel<Meeting::right>, {.grid = 1, .block = 96}, out);
    expect(status.ok() && values[0] == 33, "a barrier of two of three warps", status.message);
    expect_fault(launch(named_kernel<Meeting::other_number>, {.grid = 1, .block = 96}, out),
                 "divergent barrier", "other numbers of threads at a named barrier");
    expect_fault(launch(named_kernel<Meeting::one_warp_stays_away>, {.grid = 1, .block = 96}, out),
                 "divergent barrier", "a warp stays away from a named barrier");
    expect(launch(registers_kernel<104, 200>, {.grid = 1, .block = 384}).ok(),
           "registers given are registers taken");
    expect_fault(launch(registers_kernel<104, 208>, {.grid = 1, .block = 384}), "divergent barrier",
                 "more registers than there are");
    expect_fault(launch(registers_kernel<240, 200>, {.grid = 1, .block = 384}),
                 "launch configuration", "to give more than one has");
  }
  machine().set_seed(0);
}

}  // namespace

int main() {
  test_ring_and_mutants();
  test_places();
  test_named_barriers_and_registers();
  return emulation::report();
}
