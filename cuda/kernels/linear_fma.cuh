// The product with a 4-bit weight on the CUDA cores, for every case: any type, any architecture,
// any M, N, K, blocks that straddle rows, views that begin anywhere; forward and input gradient.
// And the LoRA product alone, onto what the output holds: the plain way's, after torch's product.
//
//   forward          out[m, n] = bias[n] + sum_r left[m, r] right[n, r] + sum_k x[m, k]  W[n, k]
//   input gradient   out[m, k] = mask * gain * sum_r left right         + sum_n dy[m, n] W[n, k]
//   LoRA alone       out      += mask * gain * sum_r left right
//
// Limiter: fused multiply-adds, 2 M N K flops at the fp32 rate (67 TFLOP/s on an H100, a fifteenth
// of its tensor cores), of which the shared-memory reads, two Vec4 for 16 of them, leave about
// half. The weight is read in 4 bits once for 64 rows of x. It serves fp32 activations, whose
// products tensor cores do not have, and what no other way takes. LoRA alone is bound by memory, a
// read and a write of out, up to R = 32 or so.
//
// Data path (fma_tile.cuh): a block of 256 threads has a tile of 64 x 64 outputs. Forward, a warp
// fetches 4 rows of 32 depths, of x and of W alike: 64 bytes a row of a 16-bit x, 16 of codes,
// whose sector's other half is the next step's. In the gradient W's quads lie across the depth: 32
// bytes of codes a row. Weights are rounded to T as dequantize_4bit writes them, and added up in
// fp32.
#pragma once

#include <cstdint>

#include "device/convert.cuh"
#include "device/global.cuh"
#include "device/thread.cuh"
#include "kernels/dropout.cuh"
#include "kernels/fma_tile.cuh"
#include "kernels/weight_values.cuh"

namespace qlora::cuda {

using LinearFmaTile = FmaTile<64, 64>;

enum class FmaBase { forward, backward_input, out };

template <class T>
struct LinearFmaArguments {
  std::int64_t m;
  RowsOperand<T> x;  // x [M, K] or grad_out [M, N]
  DeviceWeight weight;
  std::int64_t r;  // 0: no LoRA term
  RowsOperand<T> lora_left;
  RowsOperand<T> lora_right;
  DeviceDropout dropout;  // of the LoRA product
  bool has_bias;
  bool out_aligned;  // rows are whole quads, aligned to their size
  Global<const T> bias;
  std::int64_t out_cols;
  Global<T> out;  // [M, N] or [M, K]
};

// W[c, d]: quads along a row.
template <class T, bool kDouble>
struct WeightRows {
  static constexpr bool kAlongDepth = true;
  const DeviceWeight& weight;
  WeightTables& tables;

  [[nodiscard]] __device__ Quad fetch(std::int64_t c, std::int64_t d, std::int64_t end) const {
    if (c >= weight.rows) return {};
    const std::int64_t left = end - d;
    const auto run = load_weight_run<T, kDouble, kQuad>(
        weight, tables, c, d, static_cast<int>(left < kQuad ? left : kQuad));
    return {run.value[0], run.value[1], run.value[2], run.value[3]};
  }
};

// W[d, c]: quads across the depth.
template <class T, bool kDouble>
struct WeightColumns {
  static constexpr bool kAlongDepth = false;
  const DeviceWeight& weight;
  WeightTables& tables;

  [[nodiscard]] __device__ Quad fetch(std::int64_t c, std::int64_t d, std::int64_t end) const {
    if (d >= end) return {};
    const std::int64_t left = weight.cols - c;
    const auto run = load_weight_run<T, kDouble, kQuad>(
        weight, tables, d, c, static_cast<int>(left < kQuad ? left : kQuad));
    return {run.value[0], run.value[1], run.value[2], run.value[3]};
  }
};

template <class T>
__device__ void mask_sums(LinearFmaTile& tile, const DeviceDropout& dropout, std::int64_t first_row,
                          std::int64_t first_col) {
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    const DropoutRowKey key = dropout.row_key(first_row + i);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      tile.sums.value[i][j] =
          dropout.keeps(key, first_col + j) ? tile.sums.value[i][j] * dropout.gain : 0.0f;
    }
  }
}

template <class T, bool kOntoOut>
__device__ void store_outputs(const LinearFmaArguments<T>& p, const LinearFmaTile& tile,
                              std::int64_t first_row, std::int64_t first_col) {
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    const std::int64_t row = first_row + i;
    if (row >= p.m) break;
    Vec<T, kQuad> values{};
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      const std::int64_t col = first_col + j;
      if (col >= p.out_cols) break;
      float value = tile.sums.value[i][j];
      if (p.has_bias) value += widen(p.bias.load(col));
      if constexpr (kOntoOut) value += widen(p.out.load(row * p.out_cols + col));
      values.value[j] = narrow<T>(value);
    }
    const std::int64_t to = row * p.out_cols + first_col;
    if (p.out_aligned && first_col + kQuad <= p.out_cols) {
      p.out.store_vec(to, values);
      continue;
    }
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      if (first_col + j < p.out_cols) p.out.store(to + j, values.value[j]);
    }
  }
}

template <class T, bool kDouble, FmaBase kBase>
__global__ void __launch_bounds__(LinearFmaTile::kThreads, 2)
    linear_fma_kernel(const __grid_constant__ LinearFmaArguments<T> p) {
  __shared__ WeightTables tables;
  __shared__ LinearFmaTile::Memory memory;
  if constexpr (kBase != FmaBase::out) load_weight_tables<kDouble>(tables, p.weight);

  const std::int64_t tiles_across = ceil_div(p.out_cols, 64);
  const std::int64_t first_i = block_index() / tiles_across * 64;
  const std::int64_t first_j = block_index() % tiles_across * 64;
  const std::int64_t first_row = first_i + LinearFmaTile::row();
  const std::int64_t first_col = first_j + LinearFmaTile::col();

  LinearFmaTile tile;
  if (p.r > 0) {
    tile.multiply(memory, p.lora_left, p.lora_right, first_i, first_j, 0, p.r);
    if (p.dropout.active()) mask_sums<T>(tile, p.dropout, first_row, first_col);
  }
  if constexpr (kBase == FmaBase::forward) {
    const WeightRows<T, kDouble> weight{p.weight, tables};
    tile.multiply(memory, p.x, weight, first_i, first_j, 0, p.weight.cols);
  } else if constexpr (kBase == FmaBase::backward_input) {
    const WeightColumns<T, kDouble> weight{p.weight, tables};
    tile.multiply(memory, p.x, weight, first_i, first_j, 0, p.weight.rows);
  }
  store_outputs<T, kBase == FmaBase::out>(p, tile, first_row, first_col);
}

}  // namespace qlora::cuda
