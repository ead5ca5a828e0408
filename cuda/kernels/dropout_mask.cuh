// x [rows, cols] *= mask * gain, in place: what the plain way does between its two products, where
// the others mask their accumulators.
//
// Limiter: memory, one read and one write of x.
#pragma once

#include <cstdint>

#include "device/convert.cuh"
#include "device/global.cuh"
#include "device/thread.cuh"
#include "kernels/dropout.cuh"

namespace qlora::cuda {

inline constexpr int kMaskThreads = 256;

template <class T>
struct DropoutMaskArguments {
  std::int64_t rows, cols;
  DeviceDropout dropout;
  Global<T> x;  // [rows, cols]
};

// A block of threads takes row after row, so that a row's key is worked out once for many columns.
template <class T>
__global__ void __launch_bounds__(kMaskThreads)
    dropout_mask_kernel(const __grid_constant__ DropoutMaskArguments<T> p) {
  for (std::int64_t row = block_index(); row < p.rows; row += grid_blocks()) {
    const DropoutRowKey key = p.dropout.row_key(row);
    for (std::int64_t col = thread_index(); col < p.cols; col += kMaskThreads) {
      const std::int64_t at = row * p.cols + col;
      const float kept = widen(p.x.load(at)) * p.dropout.gain;
      p.x.store(at, narrow<T>(p.dropout.keeps(key, col) ? kept : 0.0f));
    }
  }
}

}  // namespace qlora::cuda
