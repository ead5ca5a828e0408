// What becomes of the sums of a skinny product's runs (lora_product.cuh): added up in ascending
// order, scaled, and written as the result and as an operand of the next product.
//
//   value[i, j]   = factor * sum over runs of source[run, i, j]
//   out[i, j]     = value, rounded to out's type
//   operand[i]    = operand_factor * value, `parts` times side by side, rounded to the activations'
//                   type; part `low_part` has what that rounding took away. Then 0 up to `padded`,
//                   for the ways of the base product take the depth in whole steps of 16
//
// Two operands of 16 bits that are split so, (high, low, high) and (high, high, low), give in three
// times R steps the product that fp32 operands would, but for low * low.
//
// With one run it rounds, transposes or pads a matrix that is already there: B and A^T, as the
// operands which stand across from u and g.
//
// Limiter: latency; it moves some 4 (runs + 1) R bytes for each of M, N or K rows.
#pragma once

#include <cstdint>

#include "device/global.cuh"
#include "device/thread.cuh"
#include "kernels/any_type.cuh"

namespace qlora::cuda {

inline constexpr int kLoraSumThreads = 256;

struct LoraSumsArguments {
  std::int64_t rows, cols;
  std::int64_t padded;  // columns of the operand; 0: none is written
  int parts;
  int low_part;  // -1: none
  std::int64_t runs;
  float factor;
  float operand_factor;
  AnyGlobal<const void> source;
  std::int64_t source_size;
  std::int64_t run_stride, row_stride, col_stride;  // of the source
  bool has_out;
  AnyGlobal<void> out;      // [rows, cols]
  AnyGlobal<void> operand;  // [rows, padded]
};

__global__ void __launch_bounds__(kLoraSumThreads)
    lora_sums_kernel(const __grid_constant__ LoraSumsArguments p) {
  const std::int64_t threads = grid_blocks() * kLoraSumThreads;
  for (std::int64_t i = block_index() * kLoraSumThreads + thread_index(); i < p.rows * p.cols;
       i += threads) {
    const std::int64_t row = i / p.cols, col = i % p.cols;
    const std::int64_t at = row * p.row_stride + col * p.col_stride;
    float value = 0.0f;
    for (std::int64_t run = 0; run < p.runs; ++run) {
      value += load_value(p.source, p.source_size, at + run * p.run_stride);
    }
    value *= p.factor;
    if (p.has_out) store_value(p.out, p.rows * p.cols, i, value);

    value *= p.operand_factor;
    const float low = value - rounded(p.operand.dtype, value);
    for (std::int64_t to = col, part = 0; to < p.padded; to += p.cols, ++part) {
      const float stored = part >= p.parts ? 0.0f : part == p.low_part ? low : value;
      store_value(p.operand, p.rows * p.padded, row * p.padded + to, stored);
    }
  }
}

}  // namespace qlora::cuda
