// Asynchronous copies and groups of them: what arrives, when, and what a wait forgotten shows as.
#include <cstdint>
#include <vector>

#include "counters.h"
#include "device/async_copy.cuh"
#include "device/launch.cuh"
#include "expect.h"

namespace {

using namespace qlora::cuda;
using emulation::expect;
using emulation::expect_fault;
using qlora::Status;

// ---- a ring of stages, the right way and with one line wrong ----

enum class Mutant {
  none,
  no_wait,
  waits_for_one_group_less,
  no_barrier_after_wait,
  one_stage_too_far,
  no_commit,
  own_copy_read_before_wait,
  stores_into_flight,
  copies_twice,
};

constexpr int kThreads = 64;
constexpr int kStages = 3;
constexpr int kStage = kThreads * 4;  // floats

// out[t] = sum over tiles of what thread 63 - t copied: every element crosses threads.
template <Mutant kMutant>
__global__ void ring_kernel(Global<const float> x, Global<float> out, int tiles) {
  const Shared<float> ring = dynamic_shared<float>(0, kStages * kStage);
  const int t = thread_index();
  const auto load = [&](int tile) {
    const int at = tile % kStages * kStage + 4 * t;
    if (tile < tiles) async_copy<16>(ring, at, x, std::int64_t{tile} * kStage + 4 * t);
    if (kMutant == Mutant::copies_twice && tile < tiles) async_copy<4>(ring, at, x, 0);
    if (kMutant == Mutant::stores_into_flight && tile < tiles) ring.store(at, 0.0f);
    if (kMutant != Mutant::no_commit || tile != 1) commit_copies();
  };
  for (int tile = 0; tile < kStages - 1; ++tile) load(tile);
  float sum = 0.0f;
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % kStages * kStage;
    if (kMutant == Mutant::own_copy_read_before_wait) sum += 0.0f * ring.load(stage + 4 * t);
    if (kMutant == Mutant::waits_for_one_group_less) {
      wait_copies<kStages - 1>();
    } else if (kMutant != Mutant::no_wait) {
      wait_copies<kStages - 2>();
    }
    if (kMutant != Mutant::no_barrier_after_wait) sync_block();
    const Vec<float, 4> values = ring.load_vec<4>(stage + 4 * (kThreads - 1 - t));
    for (const float value : values.value) sum += value;
    // Into the stage that was read before this barrier; one on is the stage being read.
    load(kMutant == Mutant::one_stage_too_far ? tile + kStages : tile + kStages - 1);
  }
  out.store(block_index() * kThreads + t, sum);
}

template <Mutant kMutant>
Status run_ring(std::vector<float>* result = nullptr) {
  constexpr int kTiles = 7;
  std::vector<float> x(kTiles * kStage + 4), out(2 * kThreads);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 31);
  const std::size_t past = reinterpret_cast<std::uintptr_t>(x.data()) % 16 / 4;
  const Status status =
      launch(ring_kernel<kMutant>,
             {.grid = 2, .block = kThreads, .dynamic_shared = kStages * kStage * sizeof(float)},
             Global<const float>(x.data() + (4 - past) % 4, kTiles * kStage),
             Global<float>(out.data(), 2 * kThreads), kTiles);
  if (result != nullptr) {
    std::vector<float> want(kThreads);
    for (int i = 0; i < kTiles * kStage; ++i) {
      want[static_cast<std::size_t>(kThreads - 1 - i % kStage / 4)] +=
          x[static_cast<std::size_t>(i) + (4 - past) % 4];
    }
    want.insert(want.end(), want.begin(), want.end());
    expect(out == want, "a ring of copies gives the sums");
  }
  return status;
}

void test_ring_and_mutants() {
  for (std::uint64_t seed = 0; seed < 8; ++seed) {
    machine().set_seed(seed);
    std::vector<float> out;
    const Status status = run_ring<Mutant::none>(&out);
    expect(status.ok(), "a ring of copies runs", status.message);
    expect_fault(run_ring<Mutant::no_wait>(), "in flight", "a copy never waited for");
    expect_fault(run_ring<Mutant::waits_for_one_group_less>(), "in flight",
                 "a wait for one group less");
    expect_fault(run_ring<Mutant::no_barrier_after_wait>(), "uninitialised",
                 "a wait without a barrier");
    expect_fault(run_ring<Mutant::one_stage_too_far>(), "race", "a stage still being read",
                 "in flight");
    expect_fault(run_ring<Mutant::no_commit>(), "in flight", "a group not committed");
    expect_fault(run_ring<Mutant::own_copy_read_before_wait>(), "in flight",
                 "one's own copy read before the wait");
    expect_fault(run_ring<Mutant::stores_into_flight>(), "in flight", "a store into a copy's way");
    expect_fault(run_ring<Mutant::copies_twice>(), "in flight", "two copies to one place");
  }
  machine().set_seed(0);
}

// ---- what arrives ----

template <int kBytes>
__global__ void bytes_kernel(Global<const std::uint8_t> x, Global<std::uint8_t> out, int valid,
                             int from, int to) {
  const Shared<std::uint8_t> bytes = dynamic_shared<std::uint8_t>(0, 64);
  for (int i = thread_index(); i < 64; i += 32) bytes.store(i, 7);
  sync_block();
  if (thread_index() == 0) {
    async_copy<kBytes>(bytes, to, x, from, valid != 0);
    commit_copies();
    wait_copies<0>();
  }
  sync_block();
  for (int i = thread_index(); i < 64; i += 32) out.store(i, bytes.load(i));
}

template <int kBytes>
Status run_bytes(bool valid, int from, int to) {
  alignas(16) std::uint8_t x[64];
  for (int i = 0; i < 64; ++i) x[i] = static_cast<std::uint8_t>(100 + i);
  std::vector<std::uint8_t> out(64), want(64, 7);
  const Status status = launch(bytes_kernel<kBytes>, {.grid = 1, .block = 32, .dynamic_shared = 64},
                               Global<const std::uint8_t>(x, 64),
                               Global<std::uint8_t>(out.data(), 64), valid ? 1 : 0, from, to);
  if (!status.ok()) return status;
  for (int i = 0; i < kBytes; ++i) {
    want[static_cast<std::size_t>(to + i)] = valid ? x[from + i] : std::uint8_t{0};
  }
  expect(out == want, "a copy changes its bytes and no others");
  return status;
}

void test_bytes() {
  expect(run_bytes<4>(true, 12, 20).ok(), "4 bytes");
  expect(run_bytes<8>(true, 24, 8).ok(), "8 bytes");
  expect(run_bytes<16>(true, 48, 16).ok(), "16 bytes");
  expect(run_bytes<16>(false, 48, 16).ok(), "16 zeros");
  expect(run_bytes<16>(false, 4000, 16).ok(), "zeros read nothing, from wherever");
  expect_fault(run_bytes<16>(true, 4000, 16), "out of bounds", "a copy from past the end");
  expect_fault(run_bytes<16>(true, 8, 16), "misaligned", "a copy off its alignment: source");
  expect_fault(run_bytes<16>(true, 16, 8), "misaligned", "a copy off its alignment: destination");
  expect_fault(run_bytes<8>(true, 16, 60), "out of bounds", "a copy past shared memory");
}

// wait_group N leaves the N newest groups under way; empty groups count.
__global__ void groups_kernel(Global<const float> x, Global<float> out, int read) {
  const Shared<float> values = dynamic_shared<float>(0, 4);
  async_copy<4>(values, 0, x, 0);
  commit_copies();
  async_copy<4>(values, 1, x, 1);
  commit_copies();
  commit_copies();
  async_copy<4>(values, 2, x, 2);
  wait_copies<1>();
  out.store(0, values.load(read));
}

void test_groups() {
  const float x[] = {1.0f, 2.0f, 3.0f};
  float out = 0.0f;
  const auto run = [&](int read) {
    return launch(groups_kernel, {.grid = 1, .block = 1, .dynamic_shared = 16},
                  Global<const float>(x, 3), Global<float>(&out, 1), read);
  };
  expect(run(0).ok() && out == 1.0f, "the oldest group is there");
  expect(run(1).ok() && out == 2.0f, "the next, too: the newest is empty");
  expect_fault(run(2), "in flight", "no wait covers what is not committed");
}

// ---- counts ----

__global__ void strided_kernel(Global<const float> x, int stride) {
  const Shared<float> values = dynamic_shared<float>(0, 1024);
  async_copy<16>(values, thread_index() * stride, x, 4 * thread_index(), thread_index() < 16);
}

void test_counts() {
  alignas(128) const float x[128] = {};
  const auto count = [&](int stride) {
    emulation::counters().reset();
    emulation::counters().enable(true);
    expect(launch(strided_kernel, {.grid = 1, .block = 32, .dynamic_shared = 4096},
                  Global<const float>(x, 128), stride)
               .ok(),
           "strided copies run");
    emulation::counters().enable(false);
    return emulation::counters().counts();
  };
  const auto dense = count(4);
  expect(dense.loaded_bytes == 256 && dense.loaded_sectors == 8, "invalid copies load nothing");
  expect(dense.bank_conflicts == 0, "16 bytes a lane, neighbours");
  expect(count(32).bank_conflicts == 4 * 7, "one in 128 bytes: eight ways in each quarter");
}

}  // namespace

int main() {
  test_ring_and_mutants();
  test_bytes();
  test_groups();
  test_counts();
  return emulation::report();
}
