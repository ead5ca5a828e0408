// wgmma on the emulator: which element stands where in a swizzled operand and in the sums, and what
// a missing fence, barrier or wait shows as.
#include <cstdint>
#include <vector>

#include "device/convert.cuh"
#include "device/fence.cuh"
#include "device/global.cuh"
#include "device/launch.cuh"
#include "device/shared.cuh"
#include "device/wgmma.cuh"
#include "expect.h"

namespace {

using namespace qlora::cuda;
using emulation::expect;
using emulation::expect_fault;
using qlora::BFloat16;
using qlora::Float16;
using qlora::Status;

enum class Mutant {
  none,
  no_fence_of_proxies,
  one_thread_does_not_fence,
  no_barrier,
  fence_without_barrier,
  wrong_swizzle,
  tile_not_aligned,
  sums_read_before_wait,
  waits_for_one_group_less,
  sums_set_before_wait,
  sums_not_fenced,
  operand_overwritten,
  other_descriptor,
  overwrites_what_another_warp_reads,
};

constexpr int kDepth = 32;  // of the 64 in a tile of rows
constexpr int kTileA = 64 * kSwizzledRow;
constexpr int kTileB = 256 * kSwizzledRow;
constexpr int kPast = 64;  // elements, for a tile that does not begin at 1024 bytes

// Element (row, column) of rows of 64.
template <Mutant kMutant>
int place(int row, int column) {
  const int exchange = kMutant == Mutant::wrong_swizzle ? row / 2 % 8 : row % 8;
  return row * kSwizzledRow + ((column / 8) ^ exchange) * 8 + column % 8;
}

// out [64, 256] = 1 + a [64, 32] b [32, 256]; b's tile has a row for each column (256 x 64), or,
// its depth across rows, four panels of 64 rows, one for each depth, and 64 columns.
template <class T, bool kAcross, Mutant kMutant>
__global__ void product_kernel(Global<const T> a, Global<const T> b, Global<float> out) {
  constexpr int kBase = kMutant == Mutant::tile_not_aligned ? kPast : 0;
  const Shared<T> memory = swizzled_shared<T>(0, kTileA + kTileB + kPast);
  const int t = thread_index();
  for (int i = t; i < 64 * kDepth; i += kWarpgroupThreads) {
    memory.store(kBase + place<kMutant>(i / kDepth, i % kDepth), a.load(i));
  }
  for (int i = t; i < 256 * kDepth; i += kWarpgroupThreads) {
    const int depth = i / 256, column = i % 256;
    const int row = kAcross ? column / 64 * 64 + depth : column;
    memory.store(kBase + kTileA + place<kMutant>(row, kAcross ? column % 64 : depth), b.load(i));
  }
  constexpr bool kFences = kMutant != Mutant::no_fence_of_proxies;
  const bool fences = kFences && !(kMutant == Mutant::one_thread_does_not_fence && t == 77);
  if (fences && kMutant != Mutant::fence_without_barrier) fence_async_proxy();
  if (kMutant != Mutant::no_barrier && kMutant != Mutant::fence_without_barrier) sync_block();
  if (kMutant == Mutant::fence_without_barrier) fence_async_proxy();

  WgmmaSums sums;
  for (int i = 0; i < WgmmaSums::kValues; ++i) sums.set(i, 1.0f);
  if (kMutant != Mutant::sums_not_fenced) fence_products();
  for (int depth = 0; depth < kDepth; depth += kWgmmaDepth) {
    const int row = kMutant == Mutant::other_descriptor && t == 3 ? 16 - depth : depth;
    const MatrixDescriptor of_a = describe_depth_along_rows(memory, kBase, row);
    const MatrixDescriptor of_b =
        kAcross ? describe_depth_across_rows(memory, kBase + kTileA, depth, 64 * kSwizzledRow)
                : describe_depth_along_rows(memory, kBase + kTileA, depth);
    multiply_add<T, kAcross>(sums, of_a, of_b);
    commit_products();
    if (kMutant == Mutant::operand_overwritten && depth > 0) memory.store(t, T{});
    if (kMutant == Mutant::sums_set_before_wait && depth > 0) sums.set(5, 0.0f);
  }
  if (kMutant == Mutant::sums_read_before_wait) out.store(t, sums.get(0));
  if (kMutant == Mutant::waits_for_one_group_less) {
    wait_products<1>(sums);
  } else {
    wait_products<0>(sums);
  }
  // A warp's wait is for its own part of the product: 16 rows of a, and all of b.
  const int own = (warp_index() + (kMutant == Mutant::overwrites_what_another_warp_reads)) % 4;
  memory.store(kBase + own * 16 * kSwizzledRow + lane_index(), T{});
  const int row = t / kWarpSize * 16 + lane_index() / 4;
  for (int i = 0; i < WgmmaSums::kValues; ++i) {
    const int column = i / 4 * 8 + lane_index() % 4 * 2 + i % 2;
    out.store((row + i / 2 % 2 * 8) * 256 + column, sums.get(i));
  }
}

template <class T>
std::vector<T> numbers(int n, int seed) {
  std::vector<T> x(static_cast<std::size_t>(n));
  for (int i = 0; i < n; ++i) {
    x[static_cast<std::size_t>(i)] =
        qlora::from_float<T>(static_cast<float>((i * 37 + seed * i / 7 + seed) % 17 - 8) / 8.0f);
  }
  return x;
}

template <class T, bool kAcross, Mutant kMutant>
Status run(bool* equal = nullptr) {
  const auto a = numbers<T>(64 * kDepth, 3), b = numbers<T>(kDepth * 256, 5);
  std::vector<float> out(64 * 256);
  const auto bytes = static_cast<std::size_t>((kTileA + kTileB + kPast) * 2);
  const Status status =
      launch(product_kernel<T, kAcross, kMutant>,
             {.grid = 1, .block = kWarpgroupThreads, .dynamic_shared = bytes},
             Global<const T>(a.data(), 64 * kDepth), Global<const T>(b.data(), kDepth * 256),
             Global<float>(out.data(), 64 * 256));
  if (equal == nullptr) return status;
  *equal = true;
  for (int m = 0; m < 64; ++m) {
    for (int n = 0; n < 256; ++n) {
      float sum = 1.0f;
      for (int k = 0; k < kDepth; ++k) {
        sum += to_float(a[static_cast<std::size_t>(m * kDepth + k)]) *
               to_float(b[static_cast<std::size_t>(k * 256 + n)]);
      }
      *equal = *equal && out[static_cast<std::size_t>(m * 256 + n)] == sum;
    }
  }
  return status;
}

template <class T, bool kAcross>
void test_product_and_mutants(const char* name) {
  for (std::uint64_t seed = 0; seed < 3; ++seed) {
    machine().set_seed(seed);
    bool equal = false;
    const Status status = run<T, kAcross, Mutant::none>(&equal);
    expect(status.ok(), name, status.message);
    expect(equal, name, "gives the product");
    expect_fault(run<T, kAcross, Mutant::no_fence_of_proxies>(), "race",
                 "operands stored, and no fence of proxies");
    expect_fault(run<T, kAcross, Mutant::one_thread_does_not_fence>(), "race",
                 "one thread of 128 does not fence");
    expect_fault(run<T, kAcross, Mutant::no_barrier>(), "race", "no barrier before wgmma",
                 "uninitialised");
    expect_fault(run<T, kAcross, Mutant::fence_without_barrier>(), "race", "a fence is no barrier",
                 "uninitialised");
    expect_fault(run<T, kAcross, Mutant::sums_read_before_wait>(), "in flight",
                 "sums read before the wait");
    expect_fault(run<T, kAcross, Mutant::sums_set_before_wait>(), "in flight",
                 "sums written before the wait");
    expect_fault(run<T, kAcross, Mutant::sums_not_fenced>(), "race", "no wgmma.fence");
    expect_fault(run<T, kAcross, Mutant::operand_overwritten>(), "race",
                 "an operand overwritten before the wait");
    expect_fault(run<T, kAcross, Mutant::other_descriptor>(), "divergent warp exchange",
                 "a thread with another descriptor");
    expect_fault(run<T, kAcross, Mutant::waits_for_one_group_less>(), "race",
                 "a wait for one group less", "in flight");
    expect_fault(run<T, kAcross, Mutant::overwrites_what_another_warp_reads>(), "race",
                 "what another warp's part reads, overwritten");
    const Status swizzle = run<T, kAcross, Mutant::wrong_swizzle>(&equal);
    expect(swizzle.ok() ? !equal : true, "another swizzle shows");
    const Status alignment = run<T, kAcross, Mutant::tile_not_aligned>(&equal);
    expect(alignment.ok() ? !equal : true, "a tile that begins anywhere shows");
  }
  machine().set_seed(0);
}

}  // namespace

int main() {
  test_product_and_mutants<BFloat16, false>("bf16, depth along rows");
  test_product_and_mutants<Float16, true>("fp16, depth across rows");
  return emulation::report();
}
