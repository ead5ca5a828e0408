// AVX-512's words on 16-bit elements: conversions, and lanes of 16 bits. Words are defined in
// simd_scalar.h.
#pragma once

#include <immintrin.h>

#include <bit>
#include <cstdint>
#include <type_traits>

#include "qlora_native/types.h"

namespace qlora::cpu {

struct Avx512Halves {
  // ---- conversions, of sixteen elements ----
  static __m512 widen_f16(__m256i bits) { return _mm512_cvtph_ps(bits); }
  static __m512 widen_bf16(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static __m256i narrow_f16(__m512 v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  // In integers and not by vcvtneps2bf16, which takes subnormals for zero.
  static __m256i narrow_bf16(__m512 v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i chosen = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16));
  }

  // ---- 16-bit elements, by their bits ----
  static constexpr int kHalves = 32;
  using H = __m512i;
  static H zero_halves() { return _mm512_setzero_si512(); }
  static float widen(Float16 value) { return _cvtsh_ss(value.bits); }
  static float widen(BFloat16 value) {
    return std::bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
  }
  template <class T>
  static H max_magnitude_halves(H magnitude, const T* p) {
    const H bits = _mm512_loadu_si512(p);
    return _mm512_max_epi16(magnitude, _mm512_and_si512(bits, _mm512_set1_epi16(0x7FFF)));
  }
  // vphminposuw finds the smallest of eight: of the complements, that is the largest.
  static std::uint16_t reduce_max_halves(H v) {
    const __m256i x = _mm256_max_epi16(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
    const __m128i y = _mm_max_epi16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    const __m128i smallest = _mm_minpos_epu16(_mm_xor_si128(y, _mm_set1_epi16(-1)));
    return static_cast<std::uint16_t>(~_mm_cvtsi128_si32(smallest));
  }

  // ---- a 16-bit type's values against bounds of the same type ----
  static constexpr bool kHasHalfBounds = true;

  template <class T>
  static H load_ordered(const T* p) {
    const H bits = _mm512_loadu_si512(p);
    return ordered(bits, _mm512_srai_epi16(bits, 15), _mm512_set1_epi16(0x7FFF));
  }
  // The tree of `midpoints`, but for the root, which is node 0.
  using HalfMidpoints = __m512;
  static HalfMidpoints half_midpoints(const float* m) {
    return _mm512_setr_ps(m[7], m[7], m[3], m[11], m[1], m[5], m[9], m[13], m[0], m[2], m[4], m[6],
                          m[8], m[10], m[12], m[14]);
  }
  struct HalfBounds {
    H root, tree;
  };
  template <class T>
  static void store_half_bounds(std::int16_t* bounds, HalfMidpoints m, float divisor,
                                float factor) {
    __m512 near = _mm512_mul_ps(m, _mm512_set1_ps(divisor));
    H nearest;
    if constexpr (std::is_same_v<T, BFloat16>) {
      const H rounded =
          _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(near), _mm512_set1_epi32(0x8000)),
                           _mm512_set1_epi32(-0x10000));
      near = _mm512_castsi512_ps(rounded);
      nearest = _mm512_srai_epi32(rounded, 16);
    } else {
      const __m256i half = narrow_f16(near);
      near = widen_f16(half);
      nearest = _mm512_cvtepi16_epi32(half);
    }
    const __mmask16 too_high =
        _mm512_cmp_ps_mask(_mm512_mul_ps(near, _mm512_set1_ps(factor)), m, _CMP_GT_OQ);
    const H above = ordered(nearest, _mm512_srai_epi32(nearest, 31), _mm512_set1_epi32(0x7FFF));
    const H bound = _mm512_mask_sub_epi32(above, too_high, above, _mm512_set1_epi32(1));
    _mm256_storeu_epi16(bounds, _mm512_cvtepi32_epi16(bound));
  }
  static HalfBounds load_half_bounds(const std::int16_t* bounds) {
    return {_mm512_set1_epi16(bounds[0]), _mm512_castsi256_si512(_mm256_loadu_epi16(bounds))};
  }
  // As in count_below; a lane holds 16 + its count.
  static H count_above_bounds(const HalfBounds& b, H x) {
    const H one = _mm512_set1_epi16(1), two = _mm512_set1_epi16(2);
    H node = _mm512_mask_add_epi16(two, _mm512_cmpgt_epi16_mask(x, b.root), two, one);
    for (int step = 1; step < 4; ++step) {
      const __mmask32 above = _mm512_cmpgt_epi16_mask(x, _mm512_permutexvar_epi16(node, b.tree));
      node = _mm512_add_epi16(node, node);
      node = _mm512_mask_add_epi16(node, above, node, one);
    }
    return node;
  }
  static void pack_counts(std::uint8_t* packed, const H (&counts)[1], __m512i order) {
    const H codes = _mm512_shuffle_epi8(order, counts[0]);  // reads four bits of a byte
    const H clean = _mm512_and_si512(codes, _mm512_set1_epi16(0xFF));
    const H pairs = _mm512_madd_epi16(clean, _mm512_set1_epi32(0x00010010));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm512_cvtepi32_epi8(pairs));
  }
  // Sign and magnitude to an integer that ascends as the values do: all bits but the sign are
  // inverted where it is set.
  static H ordered(H bits, H sign, H magnitude_bits) {
    return _mm512_ternarylogic_epi32(bits, sign, magnitude_bits, 0x78);  // a ^ (b & c)
  }

  // ---- sixteen 16-bit values, looked up by 4-bit codes ----
  // Entry i is word 2 i + 1, the upper half of the float's own lane, where rounding to bf16 leaves
  // it: nothing has to be narrowed.
  using HalfTable = __m512i;
  template <class T>
  static HalfTable half_table(__m512 t) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      // A scale that is NaN makes all entries so, and the addition could carry past it.
      const __m128 first = _mm512_castps512_ps128(t);
      const __m512i bits = _mm512_castps_si512(t);
      if (_mm_comieq_ss(first, first) == 0) {
        return _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
      }
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    } else {
      return _mm512_permutexvar_epi16(counting(0), _mm512_castsi256_si512(narrow_f16(t)));
    }
  }
  static constexpr int kDecoded = 32;
  template <bool kStream, class T>
  static void store_decoded(T* out, HalfTable t, const std::uint8_t* packed) {
    // A byte to both halves of its 32-bit lane, each shifted so that 2 code + 1 are the five lowest
    // bits of the half: those that vpermw reads. A constant brings the ones.
    const H byte = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
    constexpr int kOr3 = 0xFE;
    const H both = _mm512_ternarylogic_epi32(byte, _mm512_slli_epi32(byte, 17),
                                             _mm512_set1_epi32(0x00010008), kOr3);
    const H values = _mm512_permutexvar_epi16(_mm512_srlv_epi16(both, _mm512_set1_epi32(3)), t);
    if constexpr (kStream) {
      _mm512_stream_si512(reinterpret_cast<H*>(out), values);
    } else {
      _mm512_storeu_si512(out, values);
    }
  }

  // ---- 16-bit lanes, their look-ups and arithmetic ----
  static constexpr bool kHasHalfTables = true;

  static H set1_half(int value) { return _mm512_set1_epi16(static_cast<short>(value)); }
  static H and_halves(H a, H b) { return _mm512_and_si512(a, b); }
  static H add_halves(H a, H b) { return _mm512_add_epi16(a, b); }
  static H min_halves(H a, H b) { return _mm512_min_epu16(a, b); }
  static H max_halves(H a, H b) { return _mm512_max_epu16(a, b); }
  static H multiply_high(H a, H b) { return _mm512_mulhi_epu16(a, b); }
  template <int kBits>
  static H shift_left_halves(H a) {
    return _mm512_slli_epi16(a, kBits);
  }
  template <int kBits>
  static H shift_right_halves(H a) {
    return _mm512_srli_epi16(a, kBits);
  }
  // A permutation of one register for 32 entries, of two for 64, and more of them with a choice by
  // the index's upper bits.
  template <int kEntries>
  static H lookup_halves(const std::uint16_t* entries, H index) {
    if constexpr (kEntries == 32) {
      return _mm512_permutexvar_epi16(index, _mm512_loadu_si512(entries));
    } else if constexpr (kEntries == 64) {
      return _mm512_permutex2var_epi16(_mm512_loadu_si512(entries), index,
                                       _mm512_loadu_si512(entries + 32));
    } else {
      constexpr int kHalf = kEntries / 2;
      return _mm512_mask_blend_epi16(_mm512_test_epi16_mask(index, set1_half(kHalf)),
                                     lookup_halves<kHalf>(entries, index),
                                     lookup_halves<kHalf>(entries + kHalf, index));
    }
  }
  static H upper_halves(__m512 first, __m512 second) {
    return _mm512_permutex2var_epi16(_mm512_castps_si512(first), every_second(1),
                                     _mm512_castps_si512(second));
  }
  static H lower_halves(__m512 first, __m512 second) {
    return _mm512_permutex2var_epi16(_mm512_castps_si512(first), every_second(0),
                                     _mm512_castps_si512(second));
  }
  static void store_joined(float* p, H upper, H lower) {
    const H first = counting(0), second = counting(16);
    _mm512_storeu_si512(p, _mm512_permutex2var_epi16(lower, first, upper));
    _mm512_storeu_si512(p + 16, _mm512_permutex2var_epi16(lower, second, upper));
  }
  static H count_if_above(H count, H upper, H lower, H bound_upper, H bound_lower) {
    const __mmask32 equal = _mm512_cmpeq_epi16_mask(upper, bound_upper);
    const __mmask32 above = _mm512_cmpgt_epu16_mask(upper, bound_upper) |
                            _mm512_mask_cmpgt_epu16_mask(equal, lower, bound_lower);
    return _mm512_mask_add_epi16(count, above, count, set1_half(1));
  }
  static H add_with_sign_of(H sign, H base, H magnitude) {
    const H sum = _mm512_add_epi16(base, magnitude);
    const H signed_sum = _mm512_mask_sub_epi16(sum, _mm512_movepi16_mask(sign), base, magnitude);
    return _mm512_max_epi16(signed_sum, _mm512_setzero_si512());
  }
  static H zero_if_negative(H sign, H v) {
    return _mm512_mask_mov_epi16(v, _mm512_movepi16_mask(sign), _mm512_setzero_si512());
  }
  static H load_half_bytes(const std::uint8_t* p) {
    return _mm512_cvtepu8_epi16(_mm256_loadu_epi8(p));
  }
  static void store_half_bytes(std::uint8_t* p, H v) {
    _mm256_storeu_epi8(p, _mm512_cvtepi16_epi8(v));
  }

 private:
  // Lane i is 2 i + odd.
  static H every_second(int odd) {
    const H lane = _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16,
                                    15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return _mm512_add_epi16(_mm512_add_epi16(lane, lane), set1_half(odd));
  }
  // Lanes 2 i and 2 i + 1 are first + i, of the first and of the second register.
  static H counting(int first) {
    const H pair = _mm512_setr_epi32(0x200000, 0x210001, 0x220002, 0x230003, 0x240004, 0x250005,
                                     0x260006, 0x270007, 0x280008, 0x290009, 0x2A000A, 0x2B000B,
                                     0x2C000C, 0x2D000D, 0x2E000E, 0x2F000F);
    return _mm512_add_epi16(pair, set1_half(first));
  }
};

}  // namespace qlora::cpu
