// The dynamic 8-bit data type (dynamic_map.h): float -> nearest code, and code -> float.
//
// Nearest means by the fp32 midpoints between neighbours, where a tie goes to the EVEN code. No
// search is needed: the upper 16 bits of a float (its sign, exponent and 7 bits of its mantissa)
// name a bucket that holds at most one midpoint, and the lower 16 bits say on which side of it the
// float lies. A bucket is one word, code and limit:
//
//   code = code of the bucket's lowest value;   code += low(x) > limit
//
// where the limit is the midpoint's low half or, above an odd code, that of the float just below
// it, so that the tie itself goes up. Low halves of negative floats are inverted, so that they
// ascend, too. Buckets below 2^-23 hold no midpoint and share one; x is clamped to [-1, 1] first.
// That leaves a table of 3 kB, which stays in the L1 cache, and one gather for a code.
#pragma once

#include <bit>
#include <cstdint>

#include "qlora_native/dynamic_map.h"

namespace qlora::cpu {

struct DynamicCodes {
  static constexpr std::int32_t kLowestKey = 0x34000000 >> 16;            // of 2^-23
  static constexpr std::int32_t kHighestKey = 0x3F800000 >> 16;           // of 1
  static constexpr std::int32_t kBuckets = kHighestKey - kLowestKey + 1;  // of one sign
  static constexpr std::int32_t kNoLimit = 0xFFFF;                        // nothing is above it

  float values[256];                   // by code, ascending
  std::int32_t buckets[2 * kBuckets];  // code << 16 | limit; positive, then negative
};

// The largest float that still gets code i, not i + 1.
constexpr float upper_limit(const float (&map)[256], int i) {
  if (i == 255) return std::bit_cast<float>(0x7F800000);
  const float midpoint = (map[i] + map[i + 1]) / 2.0f;
  if (i % 2 == 0) return midpoint;
  const std::int32_t bits = std::bit_cast<std::int32_t>(midpoint);
  return std::bit_cast<float>(midpoint > 0.0f ? bits - 1 : bits + 1);
}

constexpr std::uint32_t upper_half(float x) { return std::bit_cast<std::uint32_t>(x) >> 16; }

constexpr DynamicCodes make_dynamic_codes(const float (&map)[256]) {
  DynamicCodes codes{};
  for (int i = 0; i < 256; ++i) codes.values[i] = map[i];

  constexpr std::int32_t n = DynamicCodes::kBuckets;
  int code = 0;
  for (std::int32_t i = 2 * n - 1; i >= 0; --i) {  // ascending values: from -1 to -0, from 0 to 1
    const bool negative = i >= n;
    const std::int32_t index = negative ? i : n - 1 - i;
    const std::int32_t key = DynamicCodes::kLowestKey + (negative ? index - n : index);
    const std::uint32_t half = static_cast<std::uint32_t>(key) | (negative ? 0x8000u : 0u);
    const bool shared = key == DynamicCodes::kLowestKey;
    const float lowest =
        shared && !negative ? 0.0f : std::bit_cast<float>((half << 16) | (negative ? 0xFFFFu : 0u));
    while (code < 255 && lowest > upper_limit(map, code)) ++code;

    const float limit = upper_limit(map, code);
    std::int32_t low = DynamicCodes::kNoLimit;
    if (!shared && upper_half(limit) == half) {
      low = std::bit_cast<std::int32_t>(limit) & 0xFFFF;
      if (negative) low ^= 0xFFFF;
    }
    codes.buckets[index] = (code << 16) | low;
  }
  return codes;
}

inline constexpr DynamicCodes kSignedCodes = make_dynamic_codes(kDynamicMapSigned);
inline constexpr DynamicCodes kUnsignedCodes = make_dynamic_codes(kDynamicMapUnsigned);

constexpr bool one_midpoint_a_bucket(const float (&map)[256]) {
  for (int i = 0; i < 255; ++i) {
    const float limit = upper_limit(map, i);
    if (i < 254 && upper_half(limit) == upper_half(upper_limit(map, i + 1))) return false;
    const std::uint32_t key = upper_half(limit) & 0x7FFFu;
    if (key <= static_cast<std::uint32_t>(DynamicCodes::kLowestKey)) return false;
  }
  return true;
}
static_assert(one_midpoint_a_bucket(kDynamicMapSigned) &&
              one_midpoint_a_bucket(kDynamicMapUnsigned));

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
  const I low_half = V::set1_int(0xFFFF);
  x = V::min(V::max(x, V::set1(-1.0f)), V::set1(1.0f));
  const I bits = V::bits(x);
  const I key = V::template shift_right<16>(V::bit_and(bits, V::set1_int(0x7FFFFFFF)));
  const I bucket = V::max(V::sub(key, V::set1_int(DynamicCodes::kLowestKey)), V::set1_int(0));
  const I sign = V::template shift_right<31>(bits);  // all ones where negative
  const I index = V::add(bucket, V::bit_and(sign, V::set1_int(DynamicCodes::kBuckets)));
  const I entry = V::gather(codes.buckets, index);
  const I below = V::sub(V::bit_and(entry, low_half),  // negative where x is above the limit
                         V::bit_and(V::bit_xor(bits, sign), low_half));
  return V::sub(V::template shift_right<16>(entry), V::template shift_right<31>(below));
}

// The values of kWidth codes.
template <class V>
[[gnu::always_inline]] inline typename V::F decode_8bit(const DynamicCodes& codes,
                                                        typename V::I code) {
  return V::lookup_256(codes.values, code);
}

}  // namespace qlora::cpu
