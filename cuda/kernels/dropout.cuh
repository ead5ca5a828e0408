// The dropout mask (qlora_native/dropout.h) where a kernel needs it: a function of seed, row and
// column, never stored.
#pragma once

#include <cstdint>

#include "device/global.cuh"
#include "qlora_native/dropout.h"

namespace qlora::cuda {

struct DeviceDropout {
  std::uint32_t threshold = 0;  // 0: nothing is dropped
  float gain = 1.0f;            // of what is kept
  Global<const std::int64_t> seed{};

  [[nodiscard]] __host__ __device__ bool active() const { return threshold != 0; }

  [[nodiscard]] __device__ DropoutRowKey row_key(std::int64_t row) const {
    return dropout_row_key(static_cast<std::uint64_t>(seed.load(0)), row);
  }
  [[nodiscard]] __device__ bool keeps(DropoutRowKey key, std::int64_t column) const {
    return dropout_keeps(key, static_cast<std::uint32_t>(column), threshold);
  }
};

inline DeviceDropout device_dropout(float p, const std::int64_t* seed) {
  if (!(p > 0.0f)) return {};
  return {.threshold = dropout_threshold(p), .gain = dropout_gain(p), .seed = {seed, 1}};
}

}  // namespace qlora::cuda
