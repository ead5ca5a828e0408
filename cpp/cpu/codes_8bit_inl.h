// The dynamic 8-bit data type (dynamic_map.h): float -> nearest code, and code -> float.
//
// Nearest means by the fp32 midpoints between neighbours, where a tie goes to the EVEN code. No
// search is needed: the upper 16 bits of a float (its sign, exponent and 7 bits of its mantissa)
// name a bucket that holds at most one midpoint, so with the code of the bucket's lowest value
//
//   code = lowest_code[bucket(x)];   code += x > threshold[code]
//
// where threshold[c] is the midpoint above c or, for odd c, the float just below it, so that the
// tie itself goes up. Buckets below 2^-23 hold no midpoint and share one; x is clamped to [-1, 1]
// first. That leaves two tables of 6 kB and 1 kB, which stay in the L1 cache; gathers are what
// limits it.
#pragma once

#include <bit>
#include <cstdint>

#include "qlora_native/dynamic_map.h"

namespace qlora::cpu {

struct DynamicCodes {
  static constexpr std::int32_t kLowestKey = 0x34000000 >> 16;            // of 2^-23
  static constexpr std::int32_t kHighestKey = 0x3F800000 >> 16;           // of 1
  static constexpr std::int32_t kBuckets = kHighestKey - kLowestKey + 1;  // of one sign

  float values[256];                           // by code, ascending
  float thresholds[256];                       // the last one is infinity
  std::uint8_t lowest_code[2 * kBuckets + 3];  // positive, then negative; gathers read 3 bytes more
};

constexpr DynamicCodes make_dynamic_codes(const float (&map)[256]) {
  DynamicCodes codes{};
  for (int i = 0; i < 256; ++i) codes.values[i] = map[i];
  for (int i = 0; i < 255; ++i) {
    const float midpoint = (map[i] + map[i + 1]) / 2.0f;
    const std::int32_t bits = std::bit_cast<std::int32_t>(midpoint);
    const std::int32_t below = midpoint > 0.0f ? bits - 1 : bits + 1;
    codes.thresholds[i] = i % 2 == 0 ? midpoint : std::bit_cast<float>(below);
  }
  codes.thresholds[255] = std::bit_cast<float>(0x7F800000);

  constexpr std::int32_t n = DynamicCodes::kBuckets;
  int code = 0;
  for (std::int32_t i = 2 * n - 1; i >= 0; --i) {  // ascending values: from -1 to -0, from 0 to 1
    const bool negative = i >= n;
    const std::int32_t index = negative ? i : n - 1 - i;
    const std::int32_t key = DynamicCodes::kLowestKey + (negative ? index - n : index);
    std::int32_t lowest = key << 16;
    if (negative) {
      lowest = static_cast<std::int32_t>((static_cast<std::uint32_t>(key) << 16) | 0x8000FFFFu);
    } else if (index == 0) {
      lowest = 0;
    }
    while (code < 255 && std::bit_cast<float>(lowest) > codes.thresholds[code]) ++code;
    codes.lowest_code[index] = static_cast<std::uint8_t>(code);
  }
  return codes;
}

inline constexpr DynamicCodes kSignedCodes = make_dynamic_codes(kDynamicMapSigned);
inline constexpr DynamicCodes kUnsignedCodes = make_dynamic_codes(kDynamicMapUnsigned);

constexpr bool one_midpoint_a_bucket(const DynamicCodes& codes) {
  for (int i = 0; i + 2 < 256; ++i) {
    const std::int32_t here = std::bit_cast<std::int32_t>(codes.thresholds[i]) >> 16;
    const std::int32_t next = std::bit_cast<std::int32_t>(codes.thresholds[i + 1]) >> 16;
    if (here == next) return false;
  }
  return codes.thresholds[127] > 0x1p-23f || codes.thresholds[0] > 0x1p-23f;
}
static_assert(one_midpoint_a_bucket(kSignedCodes) && one_midpoint_a_bucket(kUnsignedCodes));

template <class V>
const DynamicCodes& dynamic_codes(bool is_signed) {
  return is_signed ? kSignedCodes : kUnsignedCodes;
}

// kWidth codes, one to a 32-bit lane (V::store_bytes writes them). x is a value over its block's
// absmax: outside [-1, 1] it counts as the nearer end, and NaN as -1.
template <class V>
[[gnu::always_inline]] inline typename V::I encode_8bit(const DynamicCodes& codes,
                                                        typename V::F x) {
  using I = typename V::I;
  x = V::min(V::max(x, V::set1(-1.0f)), V::set1(1.0f));
  const I bits = V::bits(x);
  const I key = V::template shift_right<16>(V::bit_and(bits, V::set1_int(0x7FFFFFFF)));
  const I bucket = V::max(V::sub(key, V::set1_int(DynamicCodes::kLowestKey)), V::set1_int(0));
  const I sign = V::template shift_right<31>(bits);
  const I index = V::add(bucket, V::bit_and(sign, V::set1_int(DynamicCodes::kBuckets)));
  const I code = V::gather_bytes(codes.lowest_code, index);
  return V::count_above(code, x, V::gather(codes.thresholds, code));
}

// The values of kWidth codes.
template <class V>
[[gnu::always_inline]] inline typename V::F decode_8bit(const DynamicCodes& codes,
                                                        typename V::I code) {
  return V::gather(codes.values, code);
}

}  // namespace qlora::cpu
