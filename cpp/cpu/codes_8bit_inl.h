// The dynamic 8-bit data type (dynamic_map.h): float -> nearest code, and code -> float.
//
// Nearest means by the fp32 midpoints between neighbours, where a tie goes to the EVEN code. No
// search is needed: the upper 16 bits of a float (its sign, exponent and 7 bits of its mantissa)
// name a bucket that holds at most one midpoint, and the lower 16 bits say on which side of it the
// float lies. A bucket is one word, code and limit:
//
//   code = code of the bucket's lowest value;   code += low(x) > limit
//        = (word + low(x)) >> 16,   word = code << 16 | 0xFFFF - limit
//
// where the limit is the midpoint's low half or, above an odd code, that of the float just below
// it, so that the tie itself goes up. Low halves of negative floats are inverted, so that they
// ascend, too. Buckets below 2^-23 hold no midpoint and share one.
//
// That leaves 23 kB of words (12 kB for values that are not negative), of which ordinary values,
// most of them within a few octaves, touch 3 kB. They are read one by one between two passes on
// vectors: two loads and a store for a value, which Zen 4 does in a cycle and a gather in two.
//
// Where 16-bit lanes are looked up in registers, codes_8bit_halves_inl.h does without the table;
// the codes are the same.
#pragma once

#include <bit>
#include <cstdint>

#include "codes_8bit_halves_inl.h"
#include "qlora_native/dynamic_map.h"
#include "scales_inl.h"

namespace qlora::cpu {

struct DynamicCodes {
  static constexpr std::int32_t kLowestKey = 0x34000000 >> 16;            // of 2^-23
  static constexpr std::int32_t kHighestKey = 0x3F800000 >> 16;           // of 1
  static constexpr std::int32_t kBuckets = kHighestKey - kLowestKey + 1;  // of one sign
  static constexpr std::int32_t kNoLimit = 0xFFFF;                        // nothing is above it

  std::int32_t words[2 * kBuckets];  // by bucket; positive, then negative
};

constexpr std::uint32_t upper_half(float x) { return std::bit_cast<std::uint32_t>(x) >> 16; }

constexpr DynamicCodes make_dynamic_codes(const float (&map)[256]) {
  DynamicCodes codes{};
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
    codes.words[index] = (code << 16) | (DynamicCodes::kNoLimit - low);
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

template <bool kSigned>
inline constexpr const DynamicCodes& kDynamicCodes = kSigned ? kSignedCodes : kUnsignedCodes;

// Where the bucket of a float lies in the table, plus kLowestKey.
template <class V>
[[gnu::always_inline]] inline typename V::I bucket_of(typename V::I bits) {
  using I = typename V::I;
  const I key = V::template shift_right<16>(V::bit_and(bits, V::set1_int(0x7FFFFFFF)));
  const I bucket = V::max(key, V::set1_int(DynamicCodes::kLowestKey));
  const I sign = V::template shift_right<31>(bits);  // all ones where negative
  return V::add(bucket, V::bit_and(sign, V::set1_int(DynamicCodes::kBuckets)));
}

// The code, of the bucket's word.
template <class V>
[[gnu::always_inline]] inline typename V::I code_in_bucket(typename V::I word, typename V::I bits) {
  const auto ascending = V::bit_xor(bits, V::template shift_right<31>(bits));
  const auto sum = V::add(word, V::bit_and(ascending, V::set1_int(0xFFFF)));
  return V::template shift_right<16>(sum);
}

// at[i] = words[at[i] - kLowestKey] for i < n, one by one (as scales_inl.h's map is read, and why).
template <class V>
[[gnu::optimize("no-tree-vectorize")]] void read_words(const std::int32_t* words, std::int64_t n,
                                                       std::int32_t* at) {
#pragma GCC unroll 8
  for (std::int64_t i = 0; i < n; ++i) at[i] = words[at[i] - DynamicCodes::kLowestKey];
}

inline constexpr std::int64_t kRun8bit = 256;  // values that are encoded or decoded together

// The codes of value(0), value(kWidth), …, which hold `count` <= kRun8bit values between -1 and 1
// and a few ulp beyond. Lanes of the last vector past the end may hold any of them.
template <class V, bool kSigned, class Value>
[[gnu::always_inline]] inline void encode_by_buckets(const Value& value, std::int64_t count,
                                                     std::uint8_t* codes) {
  constexpr std::int64_t kWidth = V::kWidth;
  std::int32_t words[kRun8bit];
  for (std::int64_t i = 0; i < count; i += kWidth) {
    V::store_int(words + i, bucket_of<V>(V::bits(value(i))));
  }
  read_words<V>(kDynamicCodes<kSigned>.words, count, words);
  const auto code = [&](std::int64_t i) __attribute__((always_inline)) {
    return code_in_bucket<V>(V::load_int(words + i), V::bits(value(i)));
  };
  std::int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) V::store_bytes(codes + i, code(i));
  if (i < count) {
    std::uint8_t rest[V::kWidth];
    V::store_bytes(rest, code(i));
    for (std::int64_t j = i; j < count; ++j) codes[j] = rest[j - i];
  }
}

// The codes of value(0), value(kWidth), …, which hold `count` <= kRun8bit values over their block's
// absmax; `finite` says whether that is. If not, what lies outside [-1, 1] counts as the nearer
// end, and NaN as -1.
template <class V, bool kSigned, class Value>
[[gnu::always_inline]] inline void encode_8bit(const Value& value, std::int64_t count, bool finite,
                                               std::uint8_t* codes) {
  if (!finite) {
    const auto clamped = [&](std::int64_t i) {
      return V::min(V::max(value(i), V::set1(-1.0f)), V::set1(1.0f));
    };
    return encode_by_buckets<V, kSigned>(clamped, count, codes);
  }
  std::int64_t begin = 0;
  if constexpr (V::kHasHalfTables) {
    constexpr std::int64_t kStep = 2 * V::kWidth;
    for (; begin + kStep <= count; begin += kStep) {
      const auto code = encode_8bit_halves<V, kSigned>(value(begin), value(begin + V::kWidth));
      V::store_half_bytes(codes + begin, code);
    }
    if (begin == count) return;
  }
  const auto rest = [&](std::int64_t i) __attribute__((always_inline)) { return value(begin + i); };
  encode_by_buckets<V, kSigned>(rest, count - begin, codes + begin);
}

// values[i] = map[codes[i]] for i < count <= kRun8bit.
template <class V, bool kSigned>
[[gnu::always_inline]] inline void decode_8bit(const std::uint8_t* codes, std::int64_t count,
                                               float* values) {
  std::int64_t i = 0;
  if constexpr (V::kHasHalfTables) {
    for (; i + 2 * V::kWidth <= count; i += 2 * V::kWidth) {
      decode_8bit_halves<V, kSigned>(codes + i, values + i);
    }
  }
  read_map<V>(dynamic_map(kSigned), codes + i, count - i, values + i);
}

}  // namespace qlora::cpu
