// AVX2's words on 16-bit elements: conversions, and lanes of 16 bits. Words are defined in
// simd_scalar.h.
#pragma once

#include <immintrin.h>

#include <bit>
#include <cstdint>
#include <type_traits>

#include "qlora_native/types.h"

namespace qlora::cpu {

struct Avx2Halves {
  // ---- conversions, of eight elements ----
  template <class T>
  static __m128i load_bits(const T* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  template <class T>
  static void store_bits(T* p, __m128i bits) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bits);
  }
  static __m256 widen_f16(__m128i bits) { return _mm256_cvtph_ps(bits); }
  static __m256 widen_bf16(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static __m128i narrow_f16(__m256 v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  // Round to nearest even in integers; a NaN keeps its upper bits and is made quiet.
  static __m128i narrow_bf16(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 is_nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256i chosen = _mm256_castps_si256(
        _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), is_nan));
    const __m256i high = _mm256_srli_epi32(chosen, 16);
    const __m256i packed = _mm256_packus_epi32(high, high);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000));
  }

  // ---- 16-bit elements, by their bits ----
  static constexpr int kHalves = 16;
  using H = __m256i;
  static H zero_halves() { return _mm256_setzero_si256(); }
  static float widen(Float16 value) { return _cvtsh_ss(value.bits); }
  static float widen(BFloat16 value) {
    return std::bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
  }
  template <class T>
  static H max_magnitude_halves(H magnitude, const T* p) {
    const H bits = _mm256_loadu_si256(reinterpret_cast<const H*>(p));
    return _mm256_max_epi16(magnitude, _mm256_and_si256(bits, _mm256_set1_epi16(0x7FFF)));
  }
  // vphminposuw finds the smallest of eight: of the complements, that is the largest.
  static std::uint16_t reduce_max_halves(H v) {
    const __m128i x = _mm_max_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    const __m128i smallest = _mm_minpos_epu16(_mm_xor_si128(x, _mm_set1_epi16(-1)));
    return static_cast<std::uint16_t>(~_mm_cvtsi128_si32(smallest));
  }

  // ---- sixteen 16-bit values, looked up by 4-bit codes ----
  // The lower and the upper bytes of the entries apart, for vpshufb looks bytes up.
  struct HalfTable {
    __m256i lower, upper;
  };
  template <class T>
  static HalfTable half_table_of(__m256 low, __m256 high) {
    __m256i words;
    // A scale that is NaN makes all entries so, and the rounding by an addition could carry past
    // it.
    if (std::is_same_v<T, BFloat16> &&
        _mm_comieq_ss(_mm256_castps256_ps128(low), _mm256_castps256_ps128(low)) != 0) {
      const auto rounded = [](__m256 v) {
        const __m256i bits = _mm256_castps_si256(v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i sum =
            _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
        return _mm256_srli_epi32(sum, 16);
      };
      words = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded(low), rounded(high)), 0xD8);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      words = _mm256_set_m128i(narrow_bf16(high), narrow_bf16(low));
    } else {
      words = _mm256_set_m128i(narrow_f16(high), narrow_f16(low));
    }
    const __m256i bytes = _mm256_packus_epi16(_mm256_and_si256(words, _mm256_set1_epi16(0xFF)),
                                              _mm256_srli_epi16(words, 8));
    return {_mm256_permute4x64_epi64(bytes, 0b10001000),
            _mm256_permute4x64_epi64(bytes, 0b11011101)};
  }
  // Each half of a register takes the fours of bytes whose values it will hold; those of the first
  // and of the second codes are looked up apart, a byte at a time, and interleaved.
  static constexpr int kDecoded = 64;
  template <bool kStream, class T>
  static void store_decoded(T* out, const HalfTable& t, const std::uint8_t* packed) {
    const __m256i bytes =
        _mm256_permutevar8x32_epi32(_mm256_loadu_si256(reinterpret_cast<const H*>(packed)),
                                    _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
    const __m256i nibble = _mm256_set1_epi8(0xF);
    const __m256i first = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
    const __m256i second = _mm256_and_si256(bytes, nibble);
    const __m256i first_lower = _mm256_shuffle_epi8(t.lower, first);
    const __m256i first_upper = _mm256_shuffle_epi8(t.upper, first);
    const __m256i second_lower = _mm256_shuffle_epi8(t.lower, second);
    const __m256i second_upper = _mm256_shuffle_epi8(t.upper, second);
    const __m256i first_0 = _mm256_unpacklo_epi8(first_lower, first_upper);
    const __m256i first_1 = _mm256_unpackhi_epi8(first_lower, first_upper);
    const __m256i second_0 = _mm256_unpacklo_epi8(second_lower, second_upper);
    const __m256i second_1 = _mm256_unpackhi_epi8(second_lower, second_upper);
    store_whole<kStream>(out, _mm256_unpacklo_epi16(first_0, second_0));
    store_whole<kStream>(out + 16, _mm256_unpackhi_epi16(first_0, second_0));
    store_whole<kStream>(out + 32, _mm256_unpacklo_epi16(first_1, second_1));
    store_whole<kStream>(out + 48, _mm256_unpackhi_epi16(first_1, second_1));
  }
  template <bool kStream, class T>
  static void store_whole(T* out, __m256i v) {
    if constexpr (kStream) {
      _mm256_stream_si256(reinterpret_cast<H*>(out), v);
    } else {
      _mm256_storeu_si256(reinterpret_cast<H*>(out), v);
    }
  }

  static constexpr bool kHasHalfTables = false;

  // ---- a 16-bit type's values against bounds of the same type ----
  static constexpr bool kHasHalfBounds = true;

  template <class T>
  static H load_ordered(const T* p) {
    return ordered(_mm256_loadu_si256(reinterpret_cast<const H*>(p)));
  }
  // The midpoints in the order that half_bounds leaves them in.
  struct HalfMidpoints {
    __m256 low, high;
  };
  static HalfMidpoints half_midpoints(const float* m) {
    return {_mm256_setr_ps(m[0], m[2], m[4], m[6], m[1], m[5], m[9], m[13]),
            _mm256_setr_ps(m[8], m[10], m[12], m[14], m[3], m[11], m[7], m[7])};
  }
  // Bounds of steps 3 and 4 are looked up by vpshufb: their lower bytes, then their upper ones.
  struct HalfBounds {
    H step1, step2_low, step2_high, step3, step4;
  };
  template <class T>
  static void store_half_bounds(std::int16_t* bounds, const HalfMidpoints& m, float divisor,
                                float factor) {
    const __m256 scale = _mm256_set1_ps(divisor);
    __m256 low = _mm256_mul_ps(m.low, scale), high = _mm256_mul_ps(m.high, scale);
    H nearest;
    if constexpr (std::is_same_v<T, BFloat16>) {
      const auto round = [](__m256 v) {
        return _mm256_and_si256(_mm256_add_epi32(_mm256_castps_si256(v), _mm256_set1_epi32(0x8000)),
                                _mm256_set1_epi32(-0x10000));
      };
      const H low_bits = round(low), high_bits = round(high);
      low = _mm256_castsi256_ps(low_bits);
      high = _mm256_castsi256_ps(high_bits);
      nearest =
          _mm256_packs_epi32(_mm256_srai_epi32(low_bits, 16), _mm256_srai_epi32(high_bits, 16));
    } else {
      const __m128i low_bits = narrow_f16(low), high_bits = narrow_f16(high);
      low = widen_f16(low_bits);
      high = widen_f16(high_bits);
      nearest = _mm256_permute4x64_epi64(_mm256_set_m128i(high_bits, low_bits), 0b11011000);
    }
    const auto too_high = [&](__m256 v, __m256 midpoint) {
      return _mm256_castps_si256(
          _mm256_cmp_ps(_mm256_mul_ps(v, _mm256_set1_ps(factor)), midpoint, _CMP_GT_OQ));
    };
    const H one_less = _mm256_packs_epi32(too_high(low, m.low), too_high(high, m.high));
    const H bound = _mm256_add_epi16(ordered(nearest), one_less);
    // To low and high bytes, but for the words of the first two steps.
    const H planes = _mm256_shuffle_epi8(
        bound, _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,  //
                                0, 2, 4, 6, 1, 3, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    _mm256_storeu_si256(reinterpret_cast<H*>(bounds), planes);
  }
  static HalfBounds load_half_bounds(const std::int16_t* bounds) {
    return {_mm256_set1_epi16(bounds[14]), _mm256_set1_epi16(bounds[12]),
            _mm256_set1_epi16(bounds[13]), _mm256_broadcastsi128_si256(load_bits(bounds + 8)),
            _mm256_broadcastsi128_si256(load_bits(bounds))};
  }
  // A binary search in four steps, as in count_below. The lower byte of a lane holds its count, the
  // upper one that plus 4, then plus 8: the index of the bound's upper byte.
  static H count_above_bounds(const HalfBounds& b, H x) {
    const H above1 = _mm256_cmpgt_epi16(x, b.step1);
    const H above2 = _mm256_cmpgt_epi16(x, _mm256_blendv_epi8(b.step2_low, b.step2_high, above1));
    const H count1 = _mm256_sub_epi8(_mm256_set1_epi16(0x0400), _mm256_add_epi8(above1, above1));
    const H count2 = _mm256_sub_epi8(count1, above2);
    const H above3 = _mm256_cmpgt_epi16(x, _mm256_shuffle_epi8(b.step3, count2));
    const H count3 = _mm256_sub_epi8(_mm256_add_epi8(count2, count2), above3);
    const H above4 = _mm256_cmpgt_epi16(x, _mm256_shuffle_epi8(b.step4, count3));
    const H count4 = _mm256_sub_epi8(_mm256_add_epi8(count3, count3), above4);
    return _mm256_and_si256(count4, _mm256_set1_epi16(0xFF));
  }
  static void pack_counts(std::uint8_t* packed, const H (&counts)[2], __m256i order) {
    const H bytes = _mm256_shuffle_epi8(order, _mm256_packus_epi16(counts[0], counts[1]));
    const H pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110));
    const __m128i fours =
        _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm_shuffle_epi32(fours, 0b11011000));
  }
  // Sign and magnitude to an integer: ascending as the values do, -0 as 0.
  static H ordered(H bits) {
    return _mm256_sign_epi16(_mm256_and_si256(bits, _mm256_set1_epi16(0x7FFF)), bits);
  }
};

}  // namespace qlora::cpu
