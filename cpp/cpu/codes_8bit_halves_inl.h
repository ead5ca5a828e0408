// The dynamic 8-bit data type on vector units that look 16-bit lanes up in registers
// (V::kHasHalfTables): 32 values at a time, and no access to memory but the codes and the values.
//
// float -> code. On its magnitude x, let k count the map's values from zero up. The map is made of
// decades, 10^-7 to 10^-6 and so on up to 1, in each of which its values lie evenly, twice as many
// in each as in the one below. So k is about linear in x within a decade, and over all of them it
// is the smallest of the decades' lines, for their slopes fall. An octave of floats meets two
// decades at most, hence
//
//   guess = min over the octave's two lines of trunc(base + slope * mantissa)
//   k     = guess + (x > limit[guess])
//
// where limit[k] is the largest magnitude that still gets k. The guess is made of the upper half of
// the float alone (exponent and 7 bits of mantissa), in 16-bit fixed point with 8 fractional bits;
// its base is shifted so that it is k or k - 1, whatever the lower half, which is proved for all
// upper halves when this is compiled. The comparison with the limit is exact, so is the code.
//
// code -> float: the upper and the lower halves of the 256 values, looked up apart and joined.
#pragma once

#include <bit>
#include <cstdint>

#include "qlora_native/dynamic_map.h"

namespace qlora::cpu {

// The largest float that still gets code i, not i + 1.
constexpr float upper_limit(const float (&map)[256], int i) {
  if (i == 255) return std::bit_cast<float>(0x7F800000);
  const float midpoint = (map[i] + map[i + 1]) / 2.0f;
  if (i % 2 == 0) return midpoint;
  const std::int32_t bits = std::bit_cast<std::int32_t>(midpoint);
  return std::bit_cast<float>(midpoint > 0.0f ? bits - 1 : bits + 1);
}

struct HalfCodes {
  using Half = std::uint16_t;

  alignas(64) Half value_upper[256], value_lower[256];  // by code
  Half limit_upper[256], limit_lower[256];              // by k; the first kLimits are used
  // Of the two lines: k at the octave's start, and its rise over the octave, both times 256. By the
  // lower five bits of the exponent, of which the octaves from 2^-23 to 1 use 24.
  Half base[2][32], rise[2][32];
};

inline constexpr int kZeroCodeSigned = 127;

// Of magnitudes: how many k there are, and the largest that gets k.
constexpr int counts_of(bool is_signed) { return is_signed ? 129 : 256; }

constexpr float magnitude_limit(bool is_signed, int k) {
  return is_signed ? upper_limit(kDynamicMapSigned, kZeroCodeSigned + k)
                   : upper_limit(kDynamicMapUnsigned, k);
}

inline constexpr int kLowestOctave = 104;  // the biased exponent of 2^-23
inline constexpr int kOctaves = 23;        // below 1; one more holds 1 itself

// By how much the lines are raised, in steps between values: more than 0.06, for of a bucket, up to
// 0.56 of a step wide, the guess sees the lower end; less than 0.3, for that is how far the limit
// between two decades lies before the upper one's first value.
inline constexpr double kGuessShift = 0.18;

// The decade that x lies in, 10^e / 10^7 <= x.
constexpr int decade_of(double x) {
  int e = 0;
  for (double end = 1e-6; x >= end * 0.9999999 && e < 6; end *= 10.0) ++e;
  return e;
}

// k of x by the line of decade e, shifted.
constexpr double line_at(bool is_signed, int e, double x) {
  double start = 1e-7;
  for (int i = 0; i < e; ++i) start *= 10.0;
  const double values = static_cast<double>((is_signed ? 1 : 2) << e);  // in this decade
  const double before = values - (is_signed ? 1.0 : 2.0) + 1.0;         // k of its first value
  const double step = 9.0 * start / values;
  return before - 0.5 + (x - start) / step + kGuessShift;
}

constexpr HalfCodes make_half_codes(bool is_signed) {
  HalfCodes codes{};
  for (int i = 0; i < 256; ++i) {
    const auto bits = std::bit_cast<std::uint32_t>(dynamic_map(is_signed)[i]);
    codes.value_upper[i] = static_cast<HalfCodes::Half>(bits >> 16);
    codes.value_lower[i] = static_cast<HalfCodes::Half>(bits);
  }
  for (int k = 0; k < counts_of(is_signed) - 1; ++k) {
    const auto bits = std::bit_cast<std::uint32_t>(magnitude_limit(is_signed, k));
    codes.limit_upper[k] = static_cast<HalfCodes::Half>(bits >> 16);
    codes.limit_lower[k] = static_cast<HalfCodes::Half>(bits);
  }
  codes.limit_upper[255] = 0x7F80;  // nothing is above the last one
  for (int octave = 0; octave <= kOctaves; ++octave) {
    const int exponent = kLowestOctave + octave;
    const auto start = static_cast<double>(std::bit_cast<float>(exponent << 23));
    const int decades[2] = {decade_of(start), decade_of(2.0 * start * 0.999)};
    for (int i = 0; i < 2; ++i) {
      const double first = line_at(is_signed, decades[i], start);
      const double last = octave < kOctaves ? line_at(is_signed, decades[i], 2.0 * start) : first;
      codes.base[i][exponent % 32] = static_cast<HalfCodes::Half>(first * 256.0);
      codes.rise[i][exponent % 32] = static_cast<HalfCodes::Half>((last - first) * 256.0);
    }
  }
  return codes;
}

template <bool kSigned>
inline constexpr HalfCodes kHalfCodes = make_half_codes(kSigned);

// The guess as the vectors compute it.
constexpr int guess_of(const HalfCodes& codes, std::uint32_t upper_half) {
  const std::uint32_t octave = (upper_half >> 7) % 32;
  std::uint32_t guess = 0xFFFF;
  for (int i = 0; i < 2; ++i) {
    const std::uint32_t risen = (((upper_half & 0x7F) << 9) * codes.rise[i][octave]) >> 16;
    const std::uint32_t line = (codes.base[i][octave] + risen) & 0xFFFF;
    if (line < guess) guess = line;
  }
  return static_cast<int>(guess >> 8);
}

// Whether, in every bucket of floats with the same upper half, the guess is k or k - 1 and has a
// limit.
constexpr bool guesses_are_near(bool is_signed, const HalfCodes& codes) {
  const int last = counts_of(is_signed) - 1;
  int k = 0;
  for (std::uint32_t half = 0x3400; half <= 0x3F80; ++half) {
    const float lowest = half == 0x3400 ? 0.0f : std::bit_cast<float>(half << 16);
    const float highest = std::bit_cast<float>((half << 16) | 0xFFFF);
    const int guess = guess_of(codes, half);
    while (k < last && lowest > magnitude_limit(is_signed, k)) ++k;
    int k_highest = k;
    while (k_highest < last && highest > magnitude_limit(is_signed, k_highest)) ++k_highest;
    if (guess > k || guess < k_highest - 1 || guess < 0 || guess > 255) return false;
    if (is_signed && guess > 127) return false;
  }
  return true;
}
static_assert(guesses_are_near(true, kHalfCodes<true>) &&
              guesses_are_near(false, kHalfCodes<false>));

// What lets the signed map be searched by magnitudes.
constexpr bool negative_side_mirrors() {
  for (int k = 1; k <= 127; ++k) {
    if (kDynamicMapSigned[127 - k] != -kDynamicMapSigned[127 + k]) return false;
  }
  return true;
}
static_assert(negative_side_mirrors());

// The codes of 2 kWidth finite values over their block's absmax, one to a 16-bit lane.
template <class V, bool kSigned>
[[gnu::always_inline]] inline typename V::H encode_8bit_halves(typename V::F first,
                                                               typename V::F second) {
  using H = typename V::H;
  constexpr int kLimits = kSigned ? 128 : 256;
  const HalfCodes& codes = kHalfCodes<kSigned>;
  const H upper = V::upper_halves(first, second);
  const H lower = V::lower_halves(first, second);
  const H magnitude = V::and_halves(upper, V::set1_half(0x7FFF));
  const H bucket = V::max_halves(magnitude, V::set1_half(kLowestOctave << 7));
  const H octave = V::template shift_right_halves<7>(bucket);
  const H mantissa = V::template shift_left_halves<9>(bucket);
  const auto line = [&](int i) __attribute__((always_inline)) {
    const H risen =
        V::multiply_high(mantissa, V::template lookup_halves<32>(codes.rise[i], octave));
    return V::add_halves(V::template lookup_halves<32>(codes.base[i], octave), risen);
  };
  const H guess = V::template shift_right_halves<8>(V::min_halves(line(0), line(1)));
  const H k = V::count_if_above(guess, magnitude, lower,
                                V::template lookup_halves<kLimits>(codes.limit_upper, guess),
                                V::template lookup_halves<kLimits>(codes.limit_lower, guess));
  if constexpr (kSigned) {
    return V::add_with_sign_of(upper, V::set1_half(kZeroCodeSigned), k);  // -1 at most: 0 below
  } else {
    return V::zero_if_negative(upper, k);
  }
}

// The values of 2 kWidth codes.
template <class V, bool kSigned>
[[gnu::always_inline]] inline void decode_8bit_halves(const std::uint8_t* codes, float* values) {
  const HalfCodes& map = kHalfCodes<kSigned>;
  const typename V::H code = V::load_half_bytes(codes);
  V::store_joined(values, V::template lookup_halves<256>(map.value_upper, code),
                  V::template lookup_halves<256>(map.value_lower, code));
}

}  // namespace qlora::cpu
