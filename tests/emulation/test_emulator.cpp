// The emulator's own tests: what it must compute, what it must find, what it must count. Each
// faulty kernel here is a right one with one line wrong.
#include <bit>
#include <cstdint>
#include <vector>

#include "counters.h"
#include "device/global.cuh"
#include "device/launch.cuh"
#include "device/shared.cuh"
#include "device/thread.cuh"
#include "device/warp.cuh"
#include "expect.h"

namespace {

using namespace qlora::cuda;
using qlora::Status;

using emulation::expect;
using emulation::expect_fault;

// ---- sums over a block, the right way and with one line wrong ----

enum class Mutant {
  none,
  no_barrier_after_store,
  no_barrier_in_loop,
  barrier_in_branch,
  two_barriers,
  past_the_end,
  before_the_start,
  off_alignment,
  reads_unwritten,
  shared_past_the_end,
  shuffle_in_branch,
  lane_has_ended,
};

constexpr int kThreads = 128;

template <Mutant kMutant>
__global__ void sum_kernel(Global<const float> x, Global<float> sums) {
  __shared__ SharedArray<float, kThreads> part;
  const int t = thread_index();
  if (kMutant == Mutant::lane_has_ended && t == 5) return;
  std::int64_t i = block_index() * kThreads + t;
  if (kMutant == Mutant::past_the_end) i += 1;
  if (kMutant == Mutant::before_the_start) i -= 1;
  float value = x.load(i);
  if (kMutant == Mutant::off_alignment) value = x.load_vec<4>(t == 3 ? 5 : 4).value[0];
  if (kMutant == Mutant::shuffle_in_branch && t < 20) value = shuffle_xor(value, 1);
  if (kMutant == Mutant::lane_has_ended) value = shuffle_xor(value, 1);
  if (kMutant != Mutant::reads_unwritten || t != 77) {
    part.store(kMutant == Mutant::shared_past_the_end ? t + 1 : t, value);
  }
  if (kMutant == Mutant::two_barriers && t % 2 == 0) {
    sync_block();
  } else if (kMutant == Mutant::barrier_in_branch) {
    if (t < 100) sync_block();
  } else if (kMutant != Mutant::no_barrier_after_store) {
    sync_block();
  }
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (t < half) {
      const float other = part.load(t + half);
      part.store(t, part.load(t) + other);
    }
    if (kMutant != Mutant::no_barrier_in_loop) sync_block();
  }
  if (t == 0) sums.store(block_index(), part.load(0));
}

template <Mutant kMutant>
Status run_sums(std::vector<float>* result = nullptr) {
  constexpr int kBlocks = 3;
  std::vector<float> x(kBlocks * kThreads), sums(kBlocks);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 7);
  const Status status = launch(sum_kernel<kMutant>, {.grid = kBlocks, .block = kThreads},
                               Global<const float>(x.data(), static_cast<std::int64_t>(x.size())),
                               Global<float>(sums.data(), kBlocks));
  if (result != nullptr) *result = sums;
  return status;
}

void test_sums_and_mutants() {
  std::vector<float> want(3);
  for (int i = 0; i < 3 * kThreads; ++i) {
    want[static_cast<std::size_t>(i / kThreads)] += static_cast<float>(i % 7);
  }
  for (std::uint64_t seed = 0; seed < 8; ++seed) {
    machine().set_seed(seed);
    std::vector<float> sums;
    const Status status = run_sums<Mutant::none>(&sums);
    expect(status.ok(), "a right kernel runs", status.message);
    expect(sums == want, "and gives the sums");

    expect_fault(run_sums<Mutant::no_barrier_after_store>(), "race", "no barrier after a store",
                 "uninitialised");
    expect_fault(run_sums<Mutant::no_barrier_in_loop>(), "race", "no barrier in a loop");
    expect_fault(run_sums<Mutant::barrier_in_branch>(), "divergent", "a barrier in a branch");
    expect_fault(run_sums<Mutant::two_barriers>(), "divergent barrier", "two barriers in a branch");
    expect_fault(run_sums<Mutant::past_the_end>(), "out of bounds", "one element past the end");
    expect_fault(run_sums<Mutant::before_the_start>(), "out of bounds", "one before the start");
    expect_fault(run_sums<Mutant::off_alignment>(), "misaligned", "a vector off its alignment");
    expect_fault(run_sums<Mutant::reads_unwritten>(), "uninitialised", "shared memory unwritten");
    expect_fault(run_sums<Mutant::shared_past_the_end>(), "out of bounds", "past a shared array");
    expect_fault(run_sums<Mutant::shuffle_in_branch>(), "divergent", "a shuffle in a branch");
    expect_fault(run_sums<Mutant::lane_has_ended>(), "divergent", "a lane that has ended");
  }
  machine().set_seed(0);
}

// ---- words of a warp ----

__global__ void warp_kernel(Global<std::uint32_t> out) {
  const int lane = lane_index();
  const auto number = static_cast<std::uint32_t>(lane);
  std::uint32_t sum = number;
  for (int step = 1; step < kWarpSize; step *= 2) sum += shuffle_xor(sum, step);
  const std::uint32_t odd = ballot(lane % 2 == 1);
  const std::uint32_t from_seven = shuffle(number * 10, 7);
  const bool any = any_lane(lane == 31);
  const bool none = any_lane(lane == 32);
  if (lane == warp_index()) {
    const int at = warp_index() * 4;
    out.store(at, sum);
    out.store(at + 1, odd);
    out.store(at + 2, from_seven);
    out.store(at + 3, any && !none ? 1u : 0u);
  }
}

void test_warp_words() {
  std::vector<std::uint32_t> out(8);
  const Status status =
      launch(warp_kernel, {.grid = 1, .block = 64}, Global<std::uint32_t>(out.data(), 8));
  expect(status.ok(), "shuffles and votes run", status.message);
  expect(out == std::vector<std::uint32_t>{496, 0xAAAAAAAAu, 70, 1, 496, 0xAAAAAAAAu, 70, 1},
         "shuffles and votes give what PTX says");
}

// ---- a warp's own barrier orders memory within it, a shuffle does not, nor between warps ----

template <bool kBarrier, int kDistance>
__global__ void neighbour_kernel(Global<int> out) {
  __shared__ SharedArray<int, 64> values;
  const int t = thread_index();
  values.store(t, t);
  if (kBarrier) {
    sync_warp();
  } else {
    static_cast<void>(any_lane(true));
  }
  out.store(t, values.load((t + kDistance) % 64));
}

template <bool kBarrier, int kDistance>
Status run_neighbours() {
  std::vector<int> out(64);
  return launch(neighbour_kernel<kBarrier, kDistance>, {.grid = 1, .block = 64},
                Global<int>(out.data(), 64));
}

template <bool kBarrier>
__global__ void partner_kernel(Global<int> out) {
  __shared__ SharedArray<int, 64> values;
  const int t = thread_index();
  values.store(t, t);
  if (kBarrier) {
    sync_warp();
  } else {
    static_cast<void>(any_lane(true));
  }
  out.store(t, values.load(t ^ 1));
}

void test_warp_barriers() {
  std::vector<int> out(64);
  const Global<int> global(out.data(), 64);
  const Status ordered = launch(partner_kernel<true>, {.grid = 1, .block = 64}, global);
  expect(ordered.ok(), "a barrier of the warp orders its memory", ordered.message);
  expect_fault(launch(partner_kernel<false>, {.grid = 1, .block = 64}, global), "race",
               "a vote orders no memory");
  expect_fault(run_neighbours<true, 32>(), "race", "a warp's barrier does not reach another warp",
               "uninitialised");
}

// ---- what else orders memory hands clocks on ----

// Thread 0 hands over to 32, which is in another warp, which hands over to 64.
template <bool kSecondAcquires>
__global__ void relay_kernel(Global<int> out, emulation::Knowledge* first,
                             emulation::Knowledge* second) {
  __shared__ SharedArray<int, 1> value;
  const int t = thread_index();
  if (t == 0) {
    value.store(0, 42);
    machine().release(*first);
  }
  if (t == 32) {
    machine().acquire(*first);
    machine().release(*second);
  }
  if (t == 64) {
    if (kSecondAcquires) machine().acquire(*second);
    out.store(0, value.load(0));
    value.store(0, 43);
  }
}

// Who read must hand over before another writes: all three, not the last of them alone.
template <int kHandOver>
__global__ void readers_kernel(Global<int> out, emulation::Knowledge* empty) {
  __shared__ SharedArray<int, 1> value;
  const int t = thread_index();
  if (t == 0) value.store(0, 1);
  sync_block();
  if (t < 3) {
    out.store(t, value.load(0));
    if (t < kHandOver) machine().release(*empty);
  }
  if (t == 3) {
    machine().acquire(*empty);
    value.store(0, 2);
  }
}

void test_clocks() {
  std::vector<int> out(4);
  const Global<int> global(out.data(), 4);
  emulation::Knowledge a, b;
  const Status relayed = launch(relay_kernel<true>, {.grid = 1, .block = 96}, global, &a, &b);
  expect(relayed.ok() && out[0] == 42, "a clock handed on twice orders memory", relayed.message);
  a = b = {};
  expect_fault(launch(relay_kernel<false>, {.grid = 1, .block = 96}, global, &a, &b), "race",
               "a clock not taken");
  a = {};
  const Status handed = launch(readers_kernel<3>, {.grid = 1, .block = 4}, global, &a);
  expect(handed.ok(), "a write after all readers handed over", handed.message);
  a = {};
  expect_fault(launch(readers_kernel<2>, {.grid = 1, .block = 4}, global, &a), "race",
               "a write after some readers handed over");
}

// ---- dynamic shared memory, atomics ----

__global__ void histogram_kernel(Global<const std::uint8_t> x, Global<int> out, int declared) {
  const Shared<int> bins = dynamic_shared<int>(16, declared);
  const int t = thread_index();
  if (t < 16) bins.store(t, 0);
  sync_block();
  static_cast<void>(bins.atomic_add(x.load(t) % 16, 1));
  sync_block();
  if (t < 16) out.store(t, bins.load(t));
}

void test_dynamic_shared_memory() {
  std::vector<std::uint8_t> x(256);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<std::uint8_t>(i * i);
  std::vector<int> out(16), want(16);
  for (const std::uint8_t value : x) ++want[value % 16];
  const auto run = [&](std::size_t bytes, int declared) {
    return launch(histogram_kernel, {.grid = 1, .block = 256, .dynamic_shared = bytes},
                  Global<const std::uint8_t>(x.data(), 256), Global<int>(out.data(), 16), declared);
  };
  const Status status = run(16 + 64, 16);
  expect(status.ok(), "dynamic shared memory and atomics run", status.message);
  expect(out == want, "and count");
  expect_fault(run(16 + 60, 16), "out of bounds", "less dynamic memory than used");
  expect_fault(run(16 + 64, 8), "out of bounds", "an index past a dynamic array");
  expect_fault(run(300 * 1024, 16), "launch configuration", "more dynamic memory than there is");
}

// ---- counters ----

template <int kStride, int kWidth>
__global__ void access_kernel(Global<const float> x, Global<float> out) {
  __shared__ SharedArray<float, 32 * 32> values;
  const int t = thread_index();
  const int at = t * kStride % (32 * 32 - kWidth + 1);
  const Vec<float, kWidth> loaded = x.load_vec<kWidth>(t * kStride);
  values.store_vec<kWidth>(at, loaded);
  out.store(t, loaded.value[0]);
}

template <int kStride, int kWidth>
emulation::Counts count() {
  std::vector<float> x(32 * 32 + 32), out(32);
  emulation::counters().reset();
  emulation::counters().enable(true);
  const Status status = launch(
      access_kernel<kStride, kWidth>, {.grid = 1, .block = 32},
      Global<const float>(
          std::bit_cast<float*>((reinterpret_cast<std::uintptr_t>(x.data()) + 127) / 128 * 128),
          32 * 32),
      Global<float>(out.data(), 32));
  emulation::counters().enable(false);
  expect(status.ok(), "an access pattern runs", status.message);
  return emulation::counters().counts();
}

void test_counters() {
  const auto dense = count<1, 1>();
  expect(dense.loaded_bytes == 128 && dense.loaded_sectors == 4, "32 floats are 4 sectors");
  expect(dense.bank_conflicts == 0 && dense.shared_passes == 1, "32 neighbours have a bank each");
  const auto second = count<2, 1>();
  expect(second.loaded_sectors == 8 && second.bank_conflicts == 1, "every second float: two ways");
  const auto eighth = count<8, 1>();
  expect(eighth.loaded_sectors == 32 && eighth.bank_conflicts == 7, "every eighth: eight ways");
  const auto wide = count<4, 4>();
  expect(wide.loaded_bytes == 512 && wide.loaded_sectors == 16, "16 bytes a lane are 16 sectors");
  expect(wide.bank_conflicts == 0 && wide.shared_passes == 4,
         "16 bytes a lane, neighbours: four passes, no conflict");
  const auto spread = count<16, 4>();
  expect(spread.loaded_sectors == 32 && spread.bank_conflicts == 4 * 3,
         "16 of every 64 bytes: a quarter-warp meets four ways");
}

// ---- the order of threads ----

__global__ void order_kernel(Global<int> order, std::vector<int>* seen) {
  seen->push_back(thread_index());
  order.store(thread_index(), 1);
}

void test_seeds() {
  std::vector<int> flags(64);
  const auto order_of = [&](std::uint64_t seed) {
    std::vector<int> seen;
    machine().set_seed(seed);
    const Status status =
        launch(order_kernel, {.grid = 1, .block = 64}, Global<int>(flags.data(), 64), &seen);
    machine().set_seed(0);
    expect(status.ok(), "an order is taken", status.message);
    return seen;
  };
  expect(order_of(0).front() == 0 && order_of(0).back() == 63, "seed 0 is ascending order");
  expect(order_of(1) != order_of(2), "seeds give different orders");
  expect(order_of(3) == order_of(3), "a seed gives the same order again");
}

}  // namespace

int main() {
  test_sums_and_mutants();
  test_warp_words();
  test_warp_barriers();
  test_clocks();
  test_dynamic_shared_memory();
  test_counters();
  test_seeds();
  return emulation::report();
}
