// y = x W^T (+ bias) (+ left right^T) for few rows of x: M = 1 … 64, on the tensor cores.
//
// Limiter: memory; the codes of W are read once, 0.5 bytes a value, and nothing else is of that
// size. In a clock an H100 delivers 14.5 bytes of them to a multiprocessor and an H200 20.7, while
// a multiprocessor starts 128 instructions of lanes and moves 128 bytes through shared memory. For
// a byte of codes (two values) this kernel takes, at M <= 8 (instructions as compiled for sm_90a):
//
//                                     instructions of lanes     bytes through shared memory
//   look-up (pair_table.cuh)          2                           4
//   codes, x and scales from shared   1/3                         2.5 (codes twice), and M / 4
//   mma, fma by scales                1/4 + 1/4
//   copies, addresses, loop           2.2
//   together                          5                           6.8 (M = 1) … 8.5 (M = 8)
//   room on an H100, H200             8.8, 6.2                    8.8, 6.2
//
// By this an H100 is bound by its memory, and an H200 by shared memory, at 90 (M = 1) to 73 % (M =
// 8) of its memory's rate. What is in flight: three stages of 8 kB a block, two blocks a
// multiprocessor (one on an A100 above M = 2, one of 99 kB on sm_86, 89, 120), 24 to 48 kB; an H100
// needs some 20 kB (600 ns). At M = 64 the tensor cores (mma.sync at some 65 % of their rate) limit
// an H100.
//
// Rounding. A scale multiplies the fp32 sum over its unit of 64 (32) values, not the values:
//
//   y[m, n] = sum over units u of   f scale[n, u] * sum over k in u of x[m, k] * T(codebook[code] /
//   f)
//
// To round codebook * scale for each value, as bitsandbytes does, takes two products and a
// conversion for a byte more, and 8-byte look-ups: 12 bytes of shared memory for a byte of codes,
// 70 % of an H100's rate and half of an H200's. It would be less exact, too: f is chosen so that
// the 16 quotients err little when they are rounded (docs/numerics.md). Scales stay fp32.
//
// Data path: HBM -> cp.async -> ring (code_ring.cuh) -> 8 bytes of codes a lane and row -> pair
// table -> A fragments; x takes the same way into B fragments; mma -> fp32 sums of a unit -> fma by
// the row's scale -> sums in registers. The warps of one row set that share the depth add up in
// shared memory at the end, in the order of their numbers; blocks that share it (split K) write
// partial sums, which a second kernel adds in the order of theirs. No bit depends on who comes
// first.
#pragma once

#include <cmath>
#include <cstdint>

#include "device/convert.cuh"
#include "device/global.cuh"
#include "device/mma.cuh"
#include "device/shared.cuh"
#include "device/thread.cuh"
#include "kernels/code_ring.cuh"
#include "kernels/few_rows_shape.cuh"
#include "kernels/pair_table.cuh"
#include "kernels/scale_panel.cuh"

namespace qlora::cuda {

// What becomes of a sum: y, or a partial sum where the depth is split among blocks.
template <class T>
struct FewRowsOutput {
  std::int64_t m, n;
  bool has_bias;
  Global<const T> bias;  // [N]
  Global<T> out;         // [M, N]
};

template <class T>
struct FewRowsArguments {
  int k;
  int steps;            // of kDepth, of the whole depth
  int split_steps;      // of one block: a multiple of a panel's
  std::int64_t splits;  // blocks that share a row set's depth
  Global<const T> x;    // [M, K]
  Global<const std::uint8_t> packed;
  FewRowsScales scales;
  std::int64_t r;         // of the LoRA term, a multiple of 16; 0: none
  Global<const T> left;   // [M, R]
  Global<const T> right;  // [N, R]
  FewRowsOutput<T> output;
  Global<float> partials;  // [splits, row sets, kSums, 4], where splits > 1
  float values[16];        // by code
};

inline constexpr int kFewRowsSharedBytes = kPairTableBytes + kPanelBytes;  // and x's ring

// A lane's sums of one fragment: rows g and g + 8, columns 2t and 2t + 1. `i` counts the sums of a
// block: fragments of its row warps, lanes.
template <class Shape, class T>
__device__ void store_sums(const FewRowsOutput<T>& to, std::int64_t first_row, int i,
                           const Vec<float, 4>& sums) {
  const int lane = i % kWarpSize, fragment = i / kWarpSize;
  const int warp_row = fragment / Shape::kFragments,
            row_tile = fragment / Shape::kTiles % kRowTiles;
  const int tile = fragment % Shape::kTiles;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const std::int64_t n =
        first_row + (warp_row * kRowTiles + row_tile) * 16 + lane / 4 + j / 2 * 8;
    const std::int64_t m = tile * 8 + lane % 4 * 2 + j % 2;
    if (n >= to.n || m >= to.m) continue;
    const float bias = to.has_bias ? widen(to.bias.load(n)) : 0.0f;
    to.out.store(m * to.n + n, narrow<T>(sums.value[j] + bias));
  }
}

// sums += left right^T: R more values of depth, 16 for each depth warp in turn.
template <class Shape, class T>
__device__ void add_lora(Accumulator (&sums)[kRowTiles][Shape::kTiles],
                         const FewRowsArguments<T>& p, const FewRowsPlace<Shape>& at,
                         std::int64_t first_row) {
  const auto four_of = [&](Global<const T> from, std::int64_t row, std::int64_t rows,
                           std::int64_t s) {
    Vec<std::uint32_t, 2> words{};
    if (row < rows) {
      words = std::bit_cast<Vec<std::uint32_t, 2>>(
          from.template load_vec<4>(row * p.r + s * 16 + at.quarter * 4));
    }
    return words;
  };
  for (std::int64_t s = at.warp_depth; s < p.r / 16; s += Shape::kDepthWarps) {
    FragmentB b[Shape::kTiles];
#pragma unroll
    for (int tile = 0; tile < Shape::kTiles; ++tile) {
      const auto words = four_of(p.left, tile * 8 + at.group, p.output.m, s);
      b[tile] = {{words.value[0], words.value[1]}};
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      const std::int64_t row = first_row + (at.warp_row * kRowTiles + i) * 16 + at.group;
      const auto upper = four_of(p.right, row, p.output.n, s);
      const auto lower = four_of(p.right, row + 8, p.output.n, s);
      const FragmentA a{{upper.value[0], lower.value[0], upper.value[1], lower.value[1]}};
#pragma unroll
      for (int tile = 0; tile < Shape::kTiles; ++tile) mma_m16n8k16<T>(sums[i][tile], a, b[tile]);
    }
  }
}

// sums += scale * (codes of W times x), for a warp's chunk of a step. The fragments of W are looked
// up first, for all columns; so that eight tiles of these fit in the registers.
template <class Shape, class T>
__device__ void multiply_chunk(Accumulator (&sums)[kRowTiles][Shape::kTiles],
                               Shared<std::uint8_t> table, const CodeRing<Shape>& codes,
                               const XRing<T, Shape>& x, const ScalePanel<Shape>& scales, int stage,
                               int step_of_panel) {
#pragma unroll
  for (int unit = 0; unit < Shape::kUnitsOfChunk; ++unit) {
    FragmentA a[kRowTiles][Shape::kMmasOfUnit];
    float upper_scale[kRowTiles], lower_scale[kRowTiles];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      const auto upper = codes.load(stage, 2 * i, unit);
      const auto lower = codes.load(stage, 2 * i + 1, unit);
#pragma unroll
      for (int s = 0; s < Shape::kMmasOfUnit; ++s) {
        const int byte = s % 2 * 2;
        a[i][s] = {{look_up_pair(table, upper.value[s / 2], byte),
                    look_up_pair(table, lower.value[s / 2], byte),
                    look_up_pair(table, upper.value[s / 2], byte + 1),
                    look_up_pair(table, lower.value[s / 2], byte + 1)}};
      }
      upper_scale[i] = scales.load(step_of_panel, unit, 2 * i);
      lower_scale[i] = scales.load(step_of_panel, unit, 2 * i + 1);
    }
#pragma unroll
    for (int tile = 0; tile < Shape::kTiles; ++tile) {
      FragmentB b[Shape::kMmasOfUnit];
      x.load(b, stage, tile, unit);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        Accumulator of_unit{};
#pragma unroll
        for (int s = 0; s < Shape::kMmasOfUnit; ++s) mma_m16n8k16<T>(of_unit, a[i][s], b[s]);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float& sum = sums[i][tile].value[j];
          sum = std::fma(of_unit.value[j], j < 2 ? upper_scale[i] : lower_scale[i], sum);
        }
      }
    }
  }
}

// The sums of the depth warps, added in the order of their numbers, by one thread for each.
template <class Shape, class T>
__device__ void reduce_block(const Accumulator (&sums)[kRowTiles][Shape::kTiles],
                             const FewRowsArguments<T>& p, const FewRowsPlace<Shape>& at,
                             std::int64_t row_set, std::int64_t split) {
  constexpr int kWarpSums = Shape::kFragments * kWarpSize;
  static_assert(Shape::kDepthWarps * Shape::kSums * 16 <= kPairTableBytes);
  const auto all = dynamic_shared<float>(0, Shape::kDepthWarps * Shape::kSums * 4);
  sync_block();  // the table and the ring are not read any more
  const int mine = at.warp_depth * Shape::kSums + at.warp_row * kWarpSums + lane_index();
#pragma unroll
  for (int i = 0; i < Shape::kFragments; ++i) {
    const float (&v)[4] = sums[i / Shape::kTiles][i % Shape::kTiles].value;
    all.store_vec((mine + i * kWarpSize) * 4, Vec<float, 4>{{v[0], v[1], v[2], v[3]}});
  }
  sync_block();
  const std::int64_t row_sets = ceil_div(p.output.n, Shape::kRows);
  for (int i = thread_index(); i < Shape::kSums; i += kFewRowsThreads) {
    Vec<float, 4> sum{};
    for (int warp = 0; warp < Shape::kDepthWarps; ++warp) {
      const auto part = all.template load_vec<4>((warp * Shape::kSums + i) * 4);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum.value[j] += part.value[j];
    }
    if (p.splits == 1) {
      store_sums<Shape>(p.output, row_set * Shape::kRows, i, sum);
    } else {
      p.partials.store_vec(((split * row_sets + row_set) * Shape::kSums + i) * 4, sum);
    }
  }
}

// Grid: row sets x splits.
template <class Shape, class T>
__global__ void __launch_bounds__(kFewRowsThreads, Shape::kTiles <= 2 ? 2 : 1)
    linear_few_rows_kernel(const __grid_constant__ FewRowsArguments<T> p) {
  constexpr int kStages = Shape::kStages, kPanelSteps = ScalePanel<Shape>::kSteps;
  static_assert(kStages % kPanelSteps == 0);
  __shared__ DynamicMap map;
  const FewRowsPlace<Shape> at;
  const std::int64_t row_set = block_index() / p.splits;
  const auto split = static_cast<int>(block_index() % p.splits);
  const std::int64_t first_row = row_set * Shape::kRows;
  const int begin = split * p.split_steps;
  const int steps = p.split_steps < p.steps - begin ? p.split_steps : p.steps - begin;
  const auto m = static_cast<int>(p.output.m);

  const auto memory = dynamic_shared<std::uint8_t>(0, kPairTableBytes);
  const XRing<T, Shape> x(dynamic_shared<T>(kFewRowsSharedBytes, kStages * m * Shape::kDepth), p.x,
                          m, p.k, at);
  const CodeRing<Shape> codes(memory, p.packed, p.output.n, p.k, first_row, at);
  ScalePanel<Shape> scales(dynamic_shared<float>(kPairTableBytes, kPanelScales), p.scales,
                           p.output.n, p.k, first_row, (begin + steps) * Shape::kDepth, at);
  const auto copy = [&](int stage, int step) {  // of this block's
    if (step < steps) {
      codes.copy(stage, (begin + step) * Shape::kDepth);
      x.copy(stage, (begin + step) * Shape::kDepth);
    }
    commit_copies();  // a group for each step, so that waiting for all but the newest two is right
  };

  for (int step = 0; step < kStages - 1; ++step) copy(step, step);
  scales.fetch(begin * Shape::kDepth);
  const float offset = p.scales.is_double ? p.scales.scales.nested_offset.load(0) : 0.0f;
  load_pair_table<T>(dynamic_shared<std::uint32_t>(0, kPairTableBytes / 4), p.values);
  if (p.scales.is_double) load_dynamic_map<true>(map);
  Accumulator sums[kRowTiles][Shape::kTiles]{};
  if (split == 0) add_lora<Shape>(sums, p, at, first_row);
  sync_block();  // the map
  scales.store(map, offset);

  // A turn of the ring at a time: with few columns its stages are constants.
  for (int turn = 0; turn < steps; turn += kStages) {
#pragma unroll(Shape::kTiles <= 2 ? kStages : 1)
    for (int stage = 0; stage < kStages; ++stage) {
      const int step = turn + stage;
      if (step >= steps) break;
      wait_copies<kStages - 2>();
      sync_block();  // this stage is there; the one before is free; the panel is there
      copy((stage + kStages - 1) % kStages, step + kStages - 1);
      const bool panel_ends = (stage + 1) % kPanelSteps == 0 && step + 1 < steps;
      if (panel_ends) scales.fetch((begin + step + 1) * Shape::kDepth);
      multiply_chunk<Shape, T>(sums, memory, codes, x, scales, stage, stage % kPanelSteps);
      if (panel_ends) {
        sync_block();  // nobody reads the panel any more
        scales.store(map, offset);
      }
    }
  }
  reduce_block<Shape, T>(sums, p, at, row_set, split);
}

// The sums of blocks that shared the depth, in the order of their numbers.
template <class T>
struct FewRowsSumArguments {
  std::int64_t splits;
  std::int64_t row_sets;
  Global<const float> partials;  // [splits, row sets, kSums, 4]
  FewRowsOutput<T> output;
};

template <class Shape, class T>
__global__ void __launch_bounds__(kFewRowsThreads)
    few_rows_sum_kernel(const __grid_constant__ FewRowsSumArguments<T> p) {
  const std::int64_t all = p.row_sets * Shape::kSums;
  const std::int64_t i = block_index() * kFewRowsThreads + thread_index();
  if (i >= all) return;
  Vec<float, 4> sum{};
  for (std::int64_t split = 0; split < p.splits; ++split) {
    const auto part = p.partials.template load_vec<4>((split * all + i) * 4);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum.value[j] += part.value[j];
  }
  store_sums<Shape>(p.output, i / Shape::kSums * Shape::kRows, static_cast<int>(i % Shape::kSums),
                    sum);
}

}  // namespace qlora::cuda
