// Consecutive values of a 4-bit weight, decoded into registers.
//
//   value = codebook[code] * scale(block), rounded once to fp32 and once to the activations' type
//
// which is what dequantize_4bit writes. The 16 values stand in shared memory once for each lane, so
// that a lane only ever reads its own bank; the map of double-quantized scales is read once for a
// run of values (scales.cuh).
#pragma once

#include <bit>
#include <cstdint>

#include "device/convert.cuh"
#include "device/global.cuh"
#include "device/shared.cuh"
#include "device/thread.cuh"
#include "kernels/scales.cuh"
#include "qlora_native/layout.h"
#include "qlora_native/params.h"

namespace qlora::cuda {

struct DeviceWeight {
  std::int64_t rows;
  std::int64_t cols;
  int log2_blocksize;
  bool whole_runs;                    // rows are whole runs of 8 values, whose bytes are aligned
  Global<const std::uint8_t> packed;  // [ceil(rows*cols/2)]
  DeviceScales scales;
  float values[16];  // by code
};

inline constexpr int kMostRun = 8;  // values that a thread decodes at a time, 4 or 8 of them

inline DeviceWeight device_weight(const Weight4bit& w) {
  const std::int64_t n = w.rows * w.cols;
  DeviceWeight weight{.rows = w.rows,
                      .cols = w.cols,
                      .log2_blocksize = std::countr_zero(static_cast<std::uint64_t>(w.blocksize)),
                      .whole_runs = false,
                      .packed = {w.packed, packed_bytes(n)},
                      .scales = device_scales(w.scales, n_blocks(n, w.blocksize)),
                      .values = {}};
  weight.whole_runs = w.cols % kMostRun == 0 && weight.packed.aligned(kMostRun / 2);
  for (int i = 0; i < 16; ++i) weight.values[i] = w.format.values[i];
  return weight;
}

// The tables in shared memory; wait at a barrier before they are read.
struct WeightTables {
  SharedArray<float, 16 * kWarpSize> values;  // [code][lane]
  DynamicMap map;
};

template <bool kDouble>
__device__ void load_weight_tables(WeightTables& tables, const DeviceWeight& weight) {
  for (int i = thread_index(); i < 16 * kWarpSize; i += block_threads()) {
    tables.values.store(i, weight.values[i / kWarpSize]);
  }
  if constexpr (kDouble) load_dynamic_map<true>(tables.map);
}

template <int N>
struct Run {
  float value[N];
};

// The values from [row, col] on; those past `count` are 0. Where the rows are whole runs, `col` is
// a multiple of N and a run that has begun is there to its end.
template <class T, bool kDouble, int N>
__device__ Run<N> load_weight_run(const DeviceWeight& w, WeightTables& tables, std::int64_t row,
                                  std::int64_t col, int count) {
  Run<N> run{};
  if (count <= 0) return run;
  const std::int64_t first = row * w.cols + col;
  const auto decode = [&](std::uint32_t code, float scale) {
    const float value = tables.values.load(static_cast<int>(code) * kWarpSize + lane_index());
    return widen(narrow<T>(value * scale));
  };
  const auto scale_of = [&](std::int64_t i) {
    return block_scale<kDouble>(w.scales, tables.map, i >> w.log2_blocksize);
  };
  if (w.whole_runs) {
    const auto bytes = w.packed.template load_vec<N / 2>(first / 2);
    const float scale = scale_of(first);  // blocks are whole runs, too
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const std::uint32_t byte = bytes.value[i / 2];
      run.value[i] = decode(i % 2 == 0 ? byte >> 4 : byte & 0xFu, scale);
    }
    return run;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i >= count) break;
    const std::uint32_t byte = w.packed.load((first + i) / 2);
    const std::uint32_t code = (first + i) % 2 == 0 ? byte >> 4 : byte & 0xFu;
    run.value[i] = decode(code, scale_of(first + i));
  }
  return run;
}

}  // namespace qlora::cuda
