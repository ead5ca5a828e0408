// The dynamic 8-bit data type in device memory: code -> float, and float -> nearest code.
//
// Nearest means by the fp32 midpoints between neighbours, where a tie goes to the EVEN code. The
// upper bits of a float, its sign, exponent and first bits of its mantissa, name a bucket that
// holds at most one midpoint; its lower bits say on which side of it the float lies. A bucket is a
// word:
//
//   code = word >> 24;   code += low bits of x > (word & 0xFFFFFF)
//
// where the limit is the midpoint's low bits or, above an odd code, those of the float just below
// it, so that the tie itself goes up. Negative floats count downwards, so theirs are inverted.
// Buckets below 2^-23 hold no midpoint and share one. Six bits of the mantissa are enough for the
// signed map; the unsigned one, whose values lie twice as dense, takes seven, and clamps negative
// values to 0. Either table has 11.8 kB.
#pragma once

#include <bit>
#include <cstdint>

#include "device/global.cuh"
#include "qlora_native/dynamic_map.h"

namespace qlora::cuda {

template <bool kSigned>
struct CodeTable {
  static constexpr int kLowBits = kSigned ? 17 : 16;
  static constexpr int kLowestKey = 0x34000000 >> kLowBits;                   // of 2^-23
  static constexpr int kBuckets = (0x3F800000 >> kLowBits) - kLowestKey + 1;  // of one sign
  static constexpr int kWords = kSigned ? 2 * kBuckets : kBuckets;            // then negative
  static constexpr std::uint32_t kLowMask = (std::uint32_t{1} << kLowBits) - 1;

  std::uint32_t word[kWords];
};

// The largest float that still gets code i, not i + 1.
constexpr float upper_limit(const float* map, int i) {
  const float midpoint = (map[i] + map[i + 1]) / 2.0f;
  if (i % 2 == 0) return midpoint;
  const auto bits = std::bit_cast<std::int32_t>(midpoint);
  return std::bit_cast<float>(midpoint > 0.0f ? bits - 1 : bits + 1);
}

template <bool kSigned>
constexpr CodeTable<kSigned> make_code_table() {
  using Table = CodeTable<kSigned>;
  const float* map = dynamic_map(kSigned);
  Table table{};
  int code = 0;
  for (int i = Table::kWords - 1; i >= 0; --i) {  // ascending: from -1 to -0, from 0 to 1
    const bool negative = kSigned && i >= Table::kBuckets;
    const int index = negative ? i : Table::kBuckets - 1 - i;
    const int key = Table::kLowestKey + (negative ? index - Table::kBuckets : index);
    const std::uint32_t top = static_cast<std::uint32_t>(key) << Table::kLowBits;
    const bool shared = key == Table::kLowestKey;
    const float lowest = negative ? std::bit_cast<float>(top | 0x80000000u | Table::kLowMask)
                         : shared ? 0.0f
                                  : std::bit_cast<float>(top);
    while (code < 255 && lowest > upper_limit(map, code)) ++code;

    std::uint32_t limit = Table::kLowMask;  // nothing is above it
    if (code < 255 && !shared) {
      const auto bits = std::bit_cast<std::uint32_t>(upper_limit(map, code));
      const std::uint32_t bucket = top | (negative ? 0x80000000u : 0u);
      if ((bits & ~Table::kLowMask) == bucket) {
        limit = bits & Table::kLowMask;
        if (negative) limit ^= Table::kLowMask;
      }
    }
    table.word[index] = static_cast<std::uint32_t>(code) << 24 | limit;
  }
  return table;
}

template <bool kSigned>
constexpr bool one_midpoint_a_bucket() {
  using Table = CodeTable<kSigned>;
  const float* map = dynamic_map(kSigned);
  for (int i = 0; i < 255; ++i) {
    const auto bits = std::bit_cast<std::uint32_t>(upper_limit(map, i));
    const auto key = static_cast<int>((bits & 0x7FFFFFFFu) >> Table::kLowBits);
    if (key <= Table::kLowestKey) return false;
    if (i == 254) break;
    const auto next = std::bit_cast<std::uint32_t>(upper_limit(map, i + 1));
    if (bits >> Table::kLowBits == next >> Table::kLowBits) return false;
  }
  return true;
}
static_assert(one_midpoint_a_bucket<true>() && one_midpoint_a_bucket<false>());

struct MapValues {
  float value[256];
};

template <bool kSigned>
constexpr MapValues make_map_values() {
  MapValues values{};
  for (int i = 0; i < 256; ++i) values.value[i] = dynamic_map(kSigned)[i];
  return values;
}

static __device__ const CodeTable<true> kSignedTable = make_code_table<true>();
static __device__ const CodeTable<false> kUnsignedTable = make_code_table<false>();
static __device__ const MapValues kSignedValues = make_map_values<true>();
static __device__ const MapValues kUnsignedValues = make_map_values<false>();

template <bool kSigned>
__device__ Global<const float> dynamic_map_values() {
  if constexpr (kSigned) return {kSignedValues.value, 256};
  if constexpr (!kSigned) return {kUnsignedValues.value, 256};
}

template <bool kSigned>
__device__ Global<const std::uint32_t> code_table_words() {
  if constexpr (kSigned) return {kSignedTable.word, CodeTable<kSigned>::kWords};
  if constexpr (!kSigned) return {kUnsignedTable.word, CodeTable<kSigned>::kWords};
}

}  // namespace qlora::cuda
