// The skinny products of the LoRA branch, [rows, depth] x [depth, cols] with few columns:
//
//   u    = drop(x) A^T     rows m, depth k     x by rows, A by rows
//   g    = dy B            rows m, depth n     dy by rows, B by columns
//   dA^T = drop(x)^T g     rows k, depth m     x by columns, g by columns
//   dB   = dy^T u          rows n, depth m     dy by columns, u by columns and, for dbias, a column
//                                              of ones beside it: dy is read once for both
//
// The depth is cut into runs, so that a short and deep product has blocks enough for every card;
// each run's sums go to memory of their own, and lora_sums.cuh adds them up in ascending order. How
// many there are depends on the shape alone: the bits do not depend on the card, on which other
// gradients are asked for, or on who comes first. Scale and dropout's gain are factors of the sums,
// applied there; here dropped values are 0.
//
// Limiter: memory up to R = 16, where a 16-bit value of x costs 16 fused multiply-adds, about what
// an H100 does in the time that it takes to arrive (3.35 TB/s, 33 T multiply-adds/s); with more
// columns the multiply-adds. Either of them is R / N of the base product's flops.
//
// Data path: fma_tile.cuh, tiles of 128 rows by 16 columns (128 threads) or 32 (256 threads). A
// warp reads 64 contiguous bytes a row of a 16-bit x, or 256 across. A thread has up to 8 quads in
// flight, so that 256 threads of a multiprocessor, with up to 255 registers each, ask for the 16 kB
// at a time that hide an H100's latency.
#pragma once

#include <cstdint>

#include "device/global.cuh"
#include "device/thread.cuh"
#include "kernels/any_type.cuh"
#include "kernels/dropout.cuh"
#include "kernels/fma_tile.cuh"
#include "qlora_native/layout.h"

namespace qlora::cuda {

inline constexpr int kLoraTileRows = 128;

// x with what is dropped set to 0; its rows are m, its columns k, whichever is the depth.
template <class Operand>
struct DroppedOperand {
  static constexpr bool kAlongDepth = Operand::kAlongDepth;
  Operand x;
  DeviceDropout dropout;

  [[nodiscard]] __device__ Quad fetch(std::int64_t c, std::int64_t d, std::int64_t end) const {
    Quad quad = x.fetch(c, d, end);
    if (!dropout.active()) return quad;
    const DropoutRowKey key = dropout.row_key(kAlongDepth ? c : d);
    const std::int64_t first = kAlongDepth ? d : c;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (!dropout.keeps(key, first + i)) quad.value[i] = 0.0f;
    }
    return quad;
  }
};

// An operand of a type known at run time: the adapters', which need not be x's. It is the small
// one, a quad or two a thread and step.
template <template <class> class Operand>
struct AnyOperand {
  static constexpr bool kAlongDepth = Operand<float>::kAlongDepth;
  DType dtype;
  Operand<float> fp32;  // the one of that type; the others are empty
  Operand<Float16> fp16;
  Operand<BFloat16> bf16;

  [[nodiscard]] __device__ Quad fetch(std::int64_t c, std::int64_t d, std::int64_t end) const {
    if (dtype == DType::float16) return fp16.fetch(c, d, end);
    if (dtype == DType::bfloat16) return bf16.fetch(c, d, end);
    return fp32.fetch(c, d, end);
  }
};

// u, and after its last column one of ones, where it is asked for.
struct OnesBeside {
  static constexpr bool kAlongDepth = false;
  ColumnsOperand<float> u;
  bool ones;

  [[nodiscard]] __device__ Quad fetch(std::int64_t c, std::int64_t d, std::int64_t end) const {
    Quad quad = u.fetch(c, d, end);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (ones && d < end && c + i == u.columns) quad.value[i] = 1.0f;
    }
    return quad;
  }
};

// [runs, rows, cols], or [runs, cols, rows] of a result that is wanted transposed; and behind them
// those of a column beside the product's [runs, rows], so that neither breaks the other's sectors.
struct LoraSums {
  std::int64_t runs, rows, cols;
  bool transposed;
  Global<float> data;

  [[nodiscard]] __device__ std::int64_t index(std::int64_t run, std::int64_t row,
                                              std::int64_t col) const {
    if (col >= cols) return (runs * cols + run) * rows + row;
    return run * rows * cols + (transposed ? col * rows + row : row * cols + col);
  }
};

template <class Left, class Right>
struct LoraProductArguments {
  std::int64_t rows, cols, depth;  // cols: with the one beside
  std::int64_t runs, run_depth;
  Left left;
  Right right;
  LoraSums sums;  // out
};

template <int kTileCols, class Left, class Right>
__global__ void __launch_bounds__(FmaTile<kLoraTileRows, kTileCols>::kThreads,
                                  256 / FmaTile<kLoraTileRows, kTileCols>::kThreads)
    lora_product_kernel(const __grid_constant__ LoraProductArguments<Left, Right> p) {
  using Tile = FmaTile<kLoraTileRows, kTileCols>;
  __shared__ typename Tile::Memory memory;

  // Blocks that read the same rows, for other columns, lie side by side.
  const std::int64_t across = ceil_div(p.cols, kTileCols);
  const std::int64_t down = ceil_div(p.rows, kLoraTileRows);
  const std::int64_t first_col = block_index() % across * kTileCols;
  const std::int64_t first_row = block_index() / across % down * kLoraTileRows;
  const std::int64_t run = block_index() / across / down;
  const std::int64_t begin = run * p.run_depth;
  const std::int64_t end = begin + p.run_depth < p.depth ? begin + p.run_depth : p.depth;

  Tile tile;
  tile.multiply(memory, p.left, p.right, first_row, first_col, begin, end);
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    const std::int64_t row = first_row + Tile::row() + i;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      const std::int64_t col = first_col + Tile::col() + j;
      if (row < p.rows && col < p.cols) {
        p.sums.data.store(p.sums.index(run, row, col), tile.sums.value[i][j]);
      }
    }
  }
}

}  // namespace qlora::cuda
