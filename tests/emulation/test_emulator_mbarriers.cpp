// The emulator's own tests of mbarriers: a warp fills the stages of a ring, another empties them,
// the right way and with one line wrong.
#include <cstdint>
#include <string_view>
#include <vector>

#include "device/global.cuh"
#include "device/launch.cuh"
#include "device/mbarrier.cuh"
#include "device/shared.cuh"
#include "device/thread.cuh"
#include "expect.h"

namespace {

using namespace qlora::cuda;
using emulation::expect;
using emulation::expect_fault;
using qlora::Status;

enum class Mutant {
  none,
  no_barrier_after_init,
  not_initialised,
  wrong_phase_of_full,
  wrong_phase_of_empty,
  phase_not_turned,
  no_wait_for_full,
  no_wait_for_empty,
  no_arrive,
  arrives_before_store,
  one_arrival_too_few,
  lane_0_without_its_warp,
};

constexpr int kStages = 3;
constexpr int kSteps = 11;

// Barriers: `full` of each stage, which the producer's lane 0 arrives at for its warp, then `empty`
// of each, which all lanes of the consumer arrive at.
template <Mutant kMutant>
__global__ void ring_kernel(Global<const int> x, Global<int> sums) {
  __shared__ SharedArray<int, kStages * kWarpSize> ring;
  __shared__ SharedArray<Mbarrier, 2 * kStages> barriers;
  const Shared<Mbarrier> b = barriers.view();
  if (thread_index() == 0) {
    for (int s = 0; s < kStages; ++s) {
      if (kMutant != Mutant::not_initialised) init_mbarrier(b, s, 1);
      init_mbarrier(b, kStages + s, kMutant == Mutant::one_arrival_too_few ? 31 : kWarpSize);
    }
  }
  if (kMutant != Mutant::no_barrier_after_init) sync_block();
  const int lane = lane_index();
  int sum = 0;
  for (int step = 0; step < kSteps; ++step) {
    const int stage = step % kStages;
    const int turn = kMutant == Mutant::phase_not_turned ? 0 : step / kStages;
    if (warp_index() == 0) {
      const int parity = (turn + (kMutant == Mutant::wrong_phase_of_empty ? 0 : 1)) % 2;
      if (kMutant != Mutant::no_wait_for_empty) wait_phase(b, kStages + stage, parity);
      if (kMutant == Mutant::arrives_before_store && lane == 0) arrive(b, stage);
      ring.store(stage * kWarpSize + lane, x.load(step * kWarpSize + lane));
      if (kMutant != Mutant::lane_0_without_its_warp) sync_warp();
      const bool arrives =
          kMutant != Mutant::arrives_before_store && (kMutant != Mutant::no_arrive || step != 4);
      if (arrives && lane == 0) arrive(b, stage);
    } else {
      const int parity = (turn + (kMutant == Mutant::wrong_phase_of_full ? 1 : 0)) % 2;
      if (kMutant != Mutant::no_wait_for_full) wait_phase(b, stage, parity);
      sum += ring.load(stage * kWarpSize + (lane + 1) % kWarpSize);
      arrive(b, kStages + stage);
    }
  }
  if (warp_index() == 1) sums.store(block_index() * kWarpSize + lane, sum);
}

template <Mutant kMutant>
Status run_ring(std::vector<int>* result = nullptr) {
  std::vector<int> x(kSteps * kWarpSize), sums(2 * kWarpSize);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<int>(i * i % 101);
  const Status status = launch(ring_kernel<kMutant>, {.grid = 2, .block = 2 * kWarpSize},
                               Global<const int>(x.data(), kSteps * kWarpSize),
                               Global<int>(sums.data(), 2 * kWarpSize));
  if (result != nullptr) *result = sums;
  return status;
}

// Who runs ahead of the other warp reads what is not there, overwrites what is not read, or gets a
// whole phase ahead, so that the parities fit again and somebody waits for ever.
void expect_lost_step(const Status& status, const char* what) {
  const std::string_view message = status.ok() ? "" : status.message;
  const bool hangs = message.starts_with("divergent barrier");
  expect_fault(status, hangs ? "divergent barrier" : "race", what, "uninitialised");
}

void test_ring_and_mutants() {
  std::vector<int> want(kWarpSize);
  for (int i = 0; i < kSteps * kWarpSize; ++i) {
    want[static_cast<std::size_t>((i + kWarpSize - 1) % kWarpSize)] += i * i % 101;
  }
  want.insert(want.end(), want.begin(), want.end());  // of each block the same
  for (std::uint64_t seed = 0; seed < 8; ++seed) {
    machine().set_seed(seed);
    std::vector<int> sums;
    const Status status = run_ring<Mutant::none>(&sums);
    expect(status.ok(), "a ring of stages runs", status.message);
    expect(sums == want, "and gives the sums");

    expect_fault(run_ring<Mutant::no_barrier_after_init>(), "race",
                 "no barrier after mbarrier.init", "uninitialised");
    expect_fault(run_ring<Mutant::not_initialised>(), "uninitialised", "no mbarrier.init");
    expect_lost_step(run_ring<Mutant::wrong_phase_of_full>(), "the other phase of full");
    expect_fault(run_ring<Mutant::wrong_phase_of_empty>(), "divergent barrier",
                 "the other phase of empty: nobody goes on");
    expect_lost_step(run_ring<Mutant::phase_not_turned>(), "a phase that does not turn");
    expect_lost_step(run_ring<Mutant::no_wait_for_full>(), "no wait for full");
    expect_lost_step(run_ring<Mutant::no_wait_for_empty>(), "a stage filled again too early");
    expect_fault(run_ring<Mutant::no_arrive>(), "divergent barrier", "an arrival missing");
    expect_lost_step(run_ring<Mutant::arrives_before_store>(), "an arrival before the store");
    expect_lost_step(run_ring<Mutant::one_arrival_too_few>(), "one arrival too few");
    expect_fault(run_ring<Mutant::lane_0_without_its_warp>(), "race",
                 "an arrival for a warp without its barrier", "uninitialised");
  }
  machine().set_seed(0);
}

}  // namespace

int main() {
  test_ring_and_mutants();
  return emulation::report();
}
