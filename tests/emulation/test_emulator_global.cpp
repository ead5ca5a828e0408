// Global memory: races within a block and between blocks, what a ticket publishes, and the far end
// of tensors past 2^31 elements.
#include <cstdint>
#include <vector>

#include "device/global.cuh"
#include "device/launch.cuh"
#include "device/shared.cuh"
#include "expect.h"
#include "sparse_memory.h"

namespace {

using namespace qlora::cuda;
using emulation::expect;
using emulation::expect_fault;
using qlora::Status;

// ---- the last block to come adds what the others stored, the right way and one line wrong ----

enum class Mutant {
  none,
  no_fence_before_ticket,
  no_fence_after_ticket,
  fence_before_barrier,
  no_barrier_before_ticket,
  no_barrier_after_ticket,
  does_not_wait_for_last,
  loads_as_constant,
  two_blocks_store,
  ticket_by_load_and_store,
};

constexpr int kBlocks = 4;
constexpr int kThreads = 64;

template <Mutant kMutant>
__global__ void last_block_kernel(Global<const int> x, Global<int> parts,
                                  Global<const int> constant_parts, Global<int> tickets,
                                  Global<int> out) {
  __shared__ SharedArray<int, 1> ticket;
  const int t = thread_index();
  const auto at = [&](std::int64_t block) { return block * kThreads + t; };
  const std::int64_t own = kMutant == Mutant::two_blocks_store ? 0 : block_index();
  parts.store(at(own), x.load(at(block_index())));
  if (kMutant == Mutant::fence_before_barrier) fence_gpu();
  if (kMutant != Mutant::no_barrier_before_ticket) sync_block();
  // The last thread: in ascending order the others have stored by then, barrier or not.
  if (t == kThreads - 1) {
    if (kMutant != Mutant::no_fence_before_ticket && kMutant != Mutant::fence_before_barrier) {
      fence_gpu();
    }
    int drawn = 0;
    if (kMutant == Mutant::ticket_by_load_and_store) {
      drawn = tickets.load(0);
      tickets.store(0, drawn + 1);
    } else {
      drawn = tickets.atomic_add(0, 1);
    }
    if (kMutant != Mutant::no_fence_after_ticket) fence_gpu();
    ticket.store(0, drawn);
  }
  sync_block();
  if (ticket.load(0) != (kMutant == Mutant::does_not_wait_for_last ? 1 : kBlocks - 1)) return;
  int sum = 0;
  for (int block = 0; block < kBlocks; ++block) {
    // The partner's, so that the barrier matters.
    const std::int64_t i = at(block) ^ 1;
    sum += kMutant == Mutant::loads_as_constant ? constant_parts.load(i) : parts.load(i);
  }
  out.store(t, sum);
  if (t == 0) tickets.store(0, 0);
}

template <Mutant kMutant>
Status run_last_block(std::vector<int>* result = nullptr) {
  std::vector<int> x(kBlocks * kThreads), parts(x.size()), tickets(1), out(kThreads);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<int>(i);
  Status status;
  for (int turn = 0; turn < 2 && status.ok(); ++turn) {  // the ticket is left as it was found
    status = launch(last_block_kernel<kMutant>, {.grid = kBlocks, .block = kThreads},
                    Global<const int>(x.data(), kBlocks * kThreads),
                    Global<int>(parts.data(), kBlocks * kThreads),
                    Global<const int>(parts.data(), kBlocks * kThreads),
                    Global<int>(tickets.data(), 1), Global<int>(out.data(), kThreads));
  }
  if (result != nullptr) *result = out;
  return status;
}

void test_last_block_and_mutants() {
  std::vector<int> want(kThreads);
  for (int i = 0; i < kBlocks * kThreads; ++i)
    want[static_cast<std::size_t>(i % kThreads ^ 1)] += i;
  for (std::uint64_t seed = 0; seed < 4; ++seed) {
    machine().set_seed(seed);
    std::vector<int> out;
    const Status status = run_last_block<Mutant::none>(&out);
    expect(status.ok(), "the last block adds", status.message);
    expect(out == want, "and gives the sums");
    constexpr const char* kRace = "race on global";
    expect_fault(run_last_block<Mutant::no_fence_before_ticket>(), kRace, "no fence at the ticket");
    expect_fault(run_last_block<Mutant::no_fence_after_ticket>(), kRace, "no fence after it");
    expect_fault(run_last_block<Mutant::fence_before_barrier>(), kRace, "a fence of each thread");
    expect_fault(run_last_block<Mutant::no_barrier_before_ticket>(), kRace,
                 "a ticket before the others have stored");
    expect_fault(run_last_block<Mutant::does_not_wait_for_last>(), kRace, "not the last block");
    expect_fault(run_last_block<Mutant::loads_as_constant>(), kRace, "loads as of a constant");
    expect_fault(run_last_block<Mutant::two_blocks_store>(), kRace, "two blocks store to a place");
    expect_fault(run_last_block<Mutant::ticket_by_load_and_store>(), kRace, "a ticket not atomic");
  }
  machine().set_seed(0);
}

// ---- within a block ----

template <bool kBarrier>
__global__ void exchange_kernel(Global<int> values, Global<int> out) {
  const int t = thread_index();
  values.store(t, t);
  if (kBarrier) sync_block();
  out.store(t, values.load(t ^ 33));
}

template <bool kBarrier>
__global__ void in_place_kernel(Global<int> values) {
  const int t = thread_index();
  const int other = values.load(t ^ 33);
  if (kBarrier) sync_block();
  values.store(t, other);
}

__global__ void overwritten_kernel(Global<const int> values, Global<int> same) {
  const int t = thread_index();
  same.store(t, values.load(t));
}

// Another thread's two-byte half of a word is no race; the word is.
template <bool kWord>
__global__ void halves_kernel(Global<std::uint16_t> values) {
  const int t = thread_index();
  if (kWord && t == 1) {
    values.store_vec<2>(0, {});
  } else {
    values.store(t, 1);
  }
}

void test_within_a_block() {
  std::vector<int> values(64), out(64);
  const Global<int> a(values.data(), 64), b(out.data(), 64);
  constexpr const char* kRace = "race on global";
  for (std::uint64_t seed = 0; seed < 4; ++seed) {
    machine().set_seed(seed);
    expect(launch(exchange_kernel<true>, {.grid = 1, .block = 64}, a, b).ok(), "an exchange");
    expect_fault(launch(exchange_kernel<false>, {.grid = 1, .block = 64}, a, b), kRace,
                 "an exchange without a barrier");
    expect(launch(in_place_kernel<true>, {.grid = 1, .block = 64}, a).ok(), "a permutation");
    expect_fault(launch(in_place_kernel<false>, {.grid = 1, .block = 64}, a), kRace,
                 "a permutation without a barrier");
    expect_fault(launch(overwritten_kernel, {.grid = 1, .block = 64},
                        Global<const int>(values.data(), 64), a),
                 kRace, "a constant overwritten");
    alignas(4) std::uint16_t halves[2];
    const Global<std::uint16_t> c(halves, 2);
    expect(launch(halves_kernel<false>, {.grid = 1, .block = 2}, c).ok(), "halves of a word");
    expect_fault(launch(halves_kernel<true>, {.grid = 1, .block = 2}, c), kRace,
                 "a word over a half");
  }
  machine().set_seed(0);
}

// ---- past 2^31 elements ----

template <bool kOverflows>
__global__ void far_kernel(Global<const std::uint8_t> x, Global<std::uint8_t> out) {
  const std::int64_t tile = block_index() * 256;
  const std::int64_t first = kOverflows ? static_cast<std::int32_t>(tile) : tile;
  const std::int64_t i = first + thread_index();
  out.store(i, static_cast<std::uint8_t>(x.load(i) + 1));
}

void test_far_end() {
  machine().set_only_ends(2);
  for (const std::int64_t power : {31, 32}) {
    const std::int64_t size = (std::int64_t{1} << power) + 512;
    const emulation::SparseMemory x(size), out(size);
    auto* in = x.as<std::uint8_t>();
    auto* result = out.as<std::uint8_t>();
    in[0] = 1;
    in[size - 1] = 2;
    const auto run = [&](auto kernel) {
      return launch(kernel, {.grid = size / 256, .block = 256},
                    Global<const std::uint8_t>(in, size), Global<std::uint8_t>(result, size));
    };
    // It becomes negative, or comes round.
    expect_fault(run(far_kernel<true>), power == 31 ? "out of bounds" : "race on global",
                 "an index of 32 bits");
    const Status status = run(far_kernel<false>);
    expect(status.ok(), "a kernel runs at both ends", status.message);
    expect(result[0] == 2 && result[511] == 1 && result[512] == 0, "at the near end");
    expect(result[size - 1] == 3 && result[size - 512] == 1 && result[size - 513] == 0,
           "at the far end");
  }
  machine().set_only_ends(0);
}

}  // namespace

int main() {
  test_last_block_and_mutants();
  test_within_a_block();
  test_far_end();
  return emulation::report();
}
