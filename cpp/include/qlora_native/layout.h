// Where a value of a quantized matrix lies: bitsandbytes' layout, read in place.
//
// A matrix [rows, cols] is flattened row-major. Two codes share a byte, the first value in the HIGH
// nibble; an odd tail is padded with the code of zero. Blocks of `blocksize` consecutive values
// share one scale; a block need not end where a row ends.
#pragma once

#include <cstdint>

#include "qlora_native/types.h"

namespace qlora {

// Double quantization groups this many absmax values under one nested absmax (QLoRA, section 3).
inline constexpr std::int64_t kNestedBlocksize = 256;

// The blockwise 8-bit optimizer state has one absmax for this many values, as bitsandbytes has.
inline constexpr std::int64_t kOptimizerBlocksize = 256;

// Values are divided by their block's absmax, or by this where it is smaller.
inline constexpr float kSmallestDivisor = 1e-38f;

inline constexpr std::int64_t kMinBlocksize = 32;
inline constexpr std::int64_t kMaxBlocksize = 4096;

QLORA_HOST_DEVICE constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

QLORA_HOST_DEVICE constexpr std::int64_t packed_bytes(std::int64_t n_values) {
  return ceil_div(n_values, 2);
}

QLORA_HOST_DEVICE constexpr std::int64_t n_blocks(std::int64_t n_values, std::int64_t blocksize) {
  return ceil_div(n_values, blocksize);
}

// The code of value `i` of a packed matrix.
QLORA_HOST_DEVICE constexpr int code_at(const std::uint8_t* packed, std::int64_t i) {
  return (i & 1) == 0 ? packed[i >> 1] >> 4 : packed[i >> 1] & 0xF;
}

[[nodiscard]] constexpr bool is_valid_blocksize(std::int64_t blocksize) {
  const bool power_of_two = blocksize > 0 && (blocksize & (blocksize - 1)) == 0;
  return power_of_two && blocksize >= kMinBlocksize && blocksize <= kMaxBlocksize;
}

}  // namespace qlora
