// Products with a 4-bit weight W [N, K] on the tensor cores, for many rows:
//
//   y [M, N]       = x W^T     (+ left right^T) (+ bias)      forward
//   grad_x [M, K]  = grad_out W (+ drop'(left right^T))       its input gradient
//
// Limiter: the tensor cores for tiles of 256 rows, shared memory for smaller ones. Clocks of a
// multiprocessor for a step of 64 depths, counted, not measured; a tile has 128 columns:
//
//   rows of the tile                                     64      128     256
//   mma.sync   A100 (2048 flops a clock)                 512     1024    2048
//              H100 (some 2600, of wgmma's 4096)         400     810     1610
//              RTX 4090 (512)                            2048    4096    8192
//   shared     matrix loads, 128 bytes a clock           512     768     1024
//   memory     and values of W and x written: together   700     1020    1410
//   issue      instructions of a scheduler's warps       420     500     660
//
// A value is dequantized once for a tile, in 3.6 instructions a lane (weight_tile.cuh): 115 for the
// 32 of a thread, under as many or fewer products. From memory a tile takes 4 kB of codes a step,
// and 8 to 32 kB of x, which the second-level cache has: at most 20 bytes a clock of the some 45
// it gives a multiprocessor. Larger tiles reuse more; fewer of them fill a card (the launcher's
// choice).
//
// Data path: x goes by cp.async into a ring of three tiles, one in use and two on their way. Codes
// wait in registers, 16 bytes a thread, for a step; then its thread looks their values up and
// writes them into one of two tiles, between the products of the step that reads the other. So one
// barrier a step is enough: past it all have read what is now written over. LoRA's operands are
// more steps of the depth, before the others, in the buffers filled last; the mask comes between.
//
// A thread finds its data by panel.cuh (x, and why no access has a bank conflict), weight_tile.cuh
// (W) and warp_tile.cuh (fragments). The forward product reads W's panels by rows [n][k], the
// gradient [n][k] too, transposed by the matrix load: the weight is dequantized as it lies in both.
//
// Registers: sums take 128 of a thread in tiles of 256 rows (255 at most: one block of 256 threads
// a multiprocessor), 64 and 32 in the smaller ones (128: two blocks). Shared memory: 128, 80 and 56
// kB; cards with 99 kB have one block of the smaller ones, and none of the large.
#pragma once

#include <cstdint>

#include "device/async_copy.cuh"
#include "device/shared.cuh"
#include "kernels/panel.cuh"
#include "kernels/tile_epilogue.cuh"
#include "kernels/tile_product.cuh"
#include "kernels/warp_tile.cuh"
#include "kernels/weight_tile.cuh"

namespace qlora::cuda {

// A block's shared memory.
template <class T, TileShape kShape>
struct TileBuffers {
  static constexpr int kActivations = kShape.activation_tile();

  Shared<T> x;        // a ring of tiles
  Shared<T> weights;  // two tiles

  __device__ TileBuffers()
      : x(dynamic_shared<T>(0, kTileStages * kActivations)),
        weights(dynamic_shared<T>(2 * kTileStages * kActivations, 2 * kWeightTile)) {}

  __device__ static int x_base(int step) { return step % kTileStages * kActivations; }
  __device__ static int weights_base(int step) { return step % 2 * kWeightTile; }
};

// Starts the copies for 64 steps of LoRA's depth, from r on. They lie in the last buffers that the
// main loop will fill.
template <TileShape kShape, class T>
__device__ void copy_lora(const TileBuffers<T, kShape>& buffers, const TileProduct<T>& p,
                          std::int64_t row, std::int64_t column, std::int64_t r) {
  copy_panel<kShape.rows>(buffers.x, buffers.x_base(kTileStages - 1), p.left, row, r);
  copy_panel<kTileColumns>(buffers.weights, buffers.weights_base(1), p.right, column, r);
}

// sums += left right^T. The first copies have been started, and kPending groups after theirs.
template <int kPending, TileShape kShape, class T>
__device__ void add_lora(WarpTile<kShape>& tile, const TileBuffers<T, kShape>& buffers,
                         const TileProduct<T>& p, std::int64_t row, std::int64_t column) {
  wait_copies<kPending>();
  for (std::int64_t r = 0;;) {
    sync_block();
    const std::int64_t rest = p.left.columns - r;
    const int steps = static_cast<int>(ceil_div(rest < kTileDepth ? rest : kTileDepth, kMmaDepth));
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      tile.template multiply_add<DepthOfRight::along_rows>(
          buffers.x, buffers.x_base(kTileStages - 1), buffers.weights, buffers.weights_base(1),
          step);
    }
    r += kTileDepth;
    if (r >= p.left.columns) return;
    sync_block();  // the panels have been read
    copy_lora(buffers, p, row, column, r);
    commit_copies();
    wait_copies<0>();
  }
}

template <TileShape kShape, DepthOfRight kDepth, class T>
__device__ void multiply_tile(const TileProduct<T>& p, DynamicMap& map) {
  constexpr bool kForward = kDepth == DepthOfRight::along_rows;
  constexpr int kStepsOfTile = kTileDepth / kMmaDepth;
  constexpr int kWeightRows = kForward ? kTileColumns : kTileDepth;
  const TileBuffers<T, kShape> buffers;
  const ChunkPlace<kWeightRows> place;
  const auto block = static_cast<std::uint32_t>(block_index());  // a grid has at most 2^31 - 1
  const std::int64_t row = std::int64_t{block % p.tiles_down} * kShape.rows;
  const std::int64_t column = std::int64_t{block / p.tiles_down} * kTileColumns;
  const auto steps = static_cast<int>(ceil_div(p.x.columns, kTileDepth));

  const auto copy_x = [&](int step) {
    if (step < steps) {
      copy_panel<kShape.rows>(buffers.x, buffers.x_base(step), p.x, row,
                              std::int64_t{step} * kTileDepth);
    }
    commit_copies();
  };
  const auto load_chunk = [&](int step) {
    const std::int64_t along = std::int64_t{step} * kTileDepth;
    return load_weight_chunk(p.weight, (kForward ? column : along) + place.row,
                             (kForward ? along : column) + place.column);
  };

  WarpTile<kShape> tile;
  tile.clear();
  if (p.left.columns > 0) copy_lora(buffers, p, row, column, 0);
  commit_copies();
  WeightChunk chunk = load_chunk(0);
#pragma unroll
  for (int step = 0; step < kTileStages - 1; ++step) copy_x(step);
  if (p.weight.double_quantized) load_dynamic_map<true>(map);
  sync_block();

  if (p.left.columns > 0) {
    add_lora<kTileStages - 1>(tile, buffers, p, row, column);
    if (p.dropout.threshold > 0) apply_dropout(tile, p.dropout, row, column);
  }
  const auto write_piece = [&](const ScaledValues<T>& scaled, int piece, int step) {
    buffers.weights.store_vec(place.index(buffers.weights_base(step), piece),
                              scaled.look_up(chunk.codes.word[piece]));
  };
  {
    const ScaledValues<T> scaled(p.weight.values, absmax_of(p.weight, chunk.scale, map));
#pragma unroll
    for (int piece = 0; piece < kWeightChunk / kPiece; ++piece) write_piece(scaled, piece, 0);
  }
  chunk = load_chunk(1);

#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait_copies<kTileStages - 2>();
    // Tiles `step` of both operands are there; what step - 1 read may be overwritten.
    sync_block();
    copy_x(step + kTileStages - 1);
    const ScaledValues<T> scaled(p.weight.values, absmax_of(p.weight, chunk.scale, map));
#pragma unroll
    for (int i = 0; i < kStepsOfTile; ++i) {
      if (i < kStepsOfTile / 2) {
        write_piece(scaled, 2 * i, step + 1);
        write_piece(scaled, 2 * i + 1, step + 1);
      } else if (i == kStepsOfTile / 2) {
        chunk = load_chunk(step + 2);
      }
      tile.template multiply_add<kDepth>(buffers.x, buffers.x_base(step), buffers.weights,
                                         buffers.weights_base(step), i);
    }
  }
  store_tile(tile, p.out, row, column);
}

// The launcher refuses cards for which the body is left out.
// By its rows, since a shape as an argument of a kernel's template is more than nvcc 13 can name.
template <class T, int kRows, DepthOfRight kDepth>
__global__ void __launch_bounds__(kLinearThreads, tile_of(kRows).blocks_per_multiprocessor)
    linear_tiles_kernel(const __grid_constant__ TileProduct<T> p) {
  if constexpr (kHasTensorCores16) {
    __shared__ DynamicMap map;
    multiply_tile<tile_of(kRows), kDepth>(p, map);
  }
}

}  // namespace qlora::cuda
