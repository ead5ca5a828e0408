// A panel of a 4-bit weight, [rows, cols] from [first_row, first_col] on, dequantized into dense
// memory: what the plain way hands to torch's matrix product.
//
// Limiter: the L2 cache, into which the panel is written and from which the product reads it; the
// codes come from memory, a quarter of the bytes. The panel is a part of the matrix where rows or
// columns begin anywhere, which dequantize_4bit, a walk over the whole of it, does not do.
//
// Data path: a thread takes 8 consecutive values of a row: 4 bytes of codes (128 contiguous bytes a
// warp, as far as the row goes) -> 8 look-ups, each in the lane's own bank -> 16 bytes stored
// (fp32: two times 16). Rows that are no whole runs of 8, and views that begin between, go by
// single values.
#pragma once

#include <cstdint>

#include "device/global.cuh"
#include "device/thread.cuh"
#include "kernels/weight_values.cuh"

namespace qlora::cuda {

inline constexpr int kPanelThreads = 256;

template <class T>
struct DequantizePanelArguments {
  DeviceWeight weight;
  std::int64_t first_row, rows;
  std::int64_t first_col, cols;  // whole runs of 8 where weight.whole_runs
  Global<T> out;                 // [rows, cols], aligned to 16 bytes
};

template <class T, bool kDouble>
__global__ void __launch_bounds__(kPanelThreads)
    dequantize_panel_kernel(const __grid_constant__ DequantizePanelArguments<T> p) {
  __shared__ WeightTables tables;
  load_weight_tables<kDouble>(tables, p.weight);
  sync_block();

  constexpr int kAccess = 16 / static_cast<int>(sizeof(T));  // values to 16 bytes
  const std::int64_t runs = ceil_div(p.cols, kMostRun);      // of a row
  const std::int64_t threads = grid_blocks() * kPanelThreads;
  for (std::int64_t i = block_index() * kPanelThreads + thread_index(); i < p.rows * runs;
       i += threads) {
    const std::int64_t row = i / runs;
    const std::int64_t col = i % runs * kMostRun;
    const auto count = static_cast<int>(p.cols - col < kMostRun ? p.cols - col : kMostRun);
    const auto run = load_weight_run<T, kDouble, kMostRun>(p.weight, tables, p.first_row + row,
                                                           p.first_col + col, count);
    const std::int64_t to = row * p.cols + col;
    if (p.weight.whole_runs) {
#pragma unroll
      for (int part = 0; part < kMostRun; part += kAccess) {
        Vec<T, kAccess> values;
#pragma unroll
        for (int k = 0; k < kAccess; ++k) values.value[k] = narrow<T>(run.value[part + k]);
        p.out.store_vec(to + part, values);
      }
      continue;
    }
#pragma unroll
    for (int k = 0; k < kMostRun; ++k) {
      if (k < count) p.out.store(to + k, narrow<T>(run.value[k]));
    }
  }
}

}  // namespace qlora::cuda
