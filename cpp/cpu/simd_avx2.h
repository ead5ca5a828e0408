// The SIMD vocabulary in AVX2 + FMA + F16C: eight fp32 lanes. Words are defined in simd_scalar.h.
#pragma once

#include <immintrin.h>

#include <bit>
#include <cstdint>
#include <cstring>

#include "qlora_native/types.h"
#include "simd_avx2_halves.h"

namespace qlora::cpu {

struct Avx2 : Avx2Halves {
  static constexpr const char* kName = "avx2";
  static constexpr int kWidth = 8;
  using F = __m256;
  using I = __m256i;

  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float value) { return _mm256_set1_ps(value); }

  // ---- memory ----
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load(const Float16* p) { return widen_f16(load_bits(p)); }
  static F load(const BFloat16* p) { return widen_bf16(load_bits(p)); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static void stream(float* p, F v) { _mm256_stream_ps(p, v); }
  static void stream_fence() { _mm_sfence(); }
  static void store(Float16* p, F v) { store_bits(p, narrow_f16(v)); }
  static void store(BFloat16* p, F v) { store_bits(p, narrow_bf16(v)); }

  static F load_n(const float* p, std::int64_t n) { return _mm256_maskload_ps(p, first_n(n)); }
  static void store_n(float* p, F v, std::int64_t n) { _mm256_maskstore_ps(p, first_n(n), v); }
  template <class T>
  static F load_n(const T* p, std::int64_t n) {
    T buffer[kWidth] = {};
    std::memcpy(buffer, p, static_cast<std::size_t>(n) * sizeof(T));
    return load(buffer);
  }
  template <class T>
  static void store_n(T* p, F v, std::int64_t n) {
    T buffer[kWidth];
    store(buffer, v);
    std::memcpy(p, buffer, static_cast<std::size_t>(n) * sizeof(T));
  }

  // ---- arithmetic ----
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F sqrt(F a) { return _mm256_sqrt_ps(a); }
  static F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max_magnitude(F magnitude, F x) {
    return _mm256_castsi256_ps(_mm256_max_epi32(bits(magnitude), bits(abs(x))));
  }
  static F sign(F x) {
    const F one = set1(1.0f);
    return sub(_mm256_and_ps(_mm256_cmp_ps(x, zero(), _CMP_GT_OQ), one),
               _mm256_and_ps(_mm256_cmp_ps(x, zero(), _CMP_LT_OQ), one));
  }
  static F where_finite(F test, F a, F b) {
    const F infinity = _mm256_set1_ps(__builtin_inff());
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(abs(test), infinity, _CMP_LT_OQ));
  }

  // ---- across lanes ----
  static float reduce_add(F v) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  static float reduce_max(F v) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }

  static float reduce_max_magnitude(F v) {
    __m128i x =
        _mm_max_epi32(_mm256_castsi256_si128(bits(v)), _mm256_extracti128_si256(bits(v), 1));
    x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0b1110));
    x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0b0001));
    return _mm_cvtss_f32(_mm_castsi128_ps(x));
  }

  // ---- 32-bit integers ----
  static I set1_int(std::int32_t value) { return _mm256_set1_epi32(value); }
  static I bits(F v) { return _mm256_castps_si256(v); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I bit_and(I a, I b) { return _mm256_and_si256(a, b); }
  static I max(I a, I b) { return _mm256_max_epi32(a, b); }
  template <int kBits>
  static I shift_right(I a) {
    return _mm256_srai_epi32(a, kBits);
  }
  static F to_floats(I a) { return _mm256_cvtepi32_ps(a); }
  static I truncate(F v) { return _mm256_cvttps_epi32(v); }
  static I count_above(I count, F x, F threshold) {
    return sub(count, bits(_mm256_cmp_ps(x, threshold, _CMP_NLE_UQ)));
  }

  // ---- bytes ----
  static I load_bytes(const std::uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadu_si64(p)); }
  static void store_bytes(std::uint8_t* p, I v) {
    const __m128i words =
        _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storeu_si64(p, _mm_packus_epi16(words, words));
  }

  // ---- 4-bit codes ----
  // Every lane takes all four bytes and shifts its own nibble to the bottom: one load, one shift.
  static I unpack_codes(const std::uint8_t* packed) {
    std::int32_t bytes;
    std::memcpy(&bytes, packed, sizeof bytes);
    return _mm256_srlv_epi32(set1_int(bytes), _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
  }
  static constexpr bool kHasPairs = false;
  // Narrowed to bytes (which leaves each half of the registers with its own codes), joined to pairs
  // by 16 * first + second, narrowed again, and the halves' byte pairs put in order.
  static void pack_codes(std::uint8_t* packed, const I (&codes)[4]) {
    const I words01 = _mm256_packus_epi32(codes[0], codes[1]);
    const I words23 = _mm256_packus_epi32(codes[2], codes[3]);
    const I nibbles = _mm256_packus_epi16(words01, words23);
    const I pairs = _mm256_maddubs_epi16(nibbles, _mm256_set1_epi16(0x0110));
    const __m128i halves =
        _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    const __m128i order = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm_shuffle_epi8(halves, order));
  }

  struct Table {
    F low, high;
  };
  static Table table(const float* entries) { return {load(entries), load(entries + 8)}; }
  static Table scaled(const Table& t, float scale) {
    return {mul(t.low, set1(scale)), mul(t.high, set1(scale))};
  }
  // vpermps reads three bits of the code; the fourth, moved to the sign, chooses the half.
  static F lookup(const Table& t, I codes) {
    const F upper_half = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, codes),
                            _mm256_permutevar8x32_ps(t.high, codes), upper_half);
  }
  template <int kShift>
  static F lookup_at(const Table& t, I words) {
    return lookup(t, shift_right<kShift>(words));
  }

  template <class T>
  static HalfTable half_table(const Table& t) {
    return half_table_of<T>(t.low, t.high);
  }

  // A binary search in four steps. A comparison gives -1, so the count is kept negative on its way;
  // the bounds of a step lie in the order in which the negative counts name them.
  struct Midpoints {
    F step1, step2_low, step2_high, step3, step4;
  };
  static Midpoints midpoints(const float* m) {
    return {set1(m[7]), set1(m[3]), set1(m[11]),
            _mm256_setr_ps(m[1], m[13], m[9], m[5], m[1], m[13], m[9], m[5]),
            _mm256_setr_ps(m[0], m[14], m[12], m[10], m[8], m[6], m[4], m[2])};
  }
  static I count_below(const Midpoints& m, F x) {
    const auto twice_and = [](I count, F above) { return add(add(count, count), bits(above)); };
    const F above1 = _mm256_cmp_ps(x, m.step1, _CMP_NLE_UQ);
    const F bound2 = _mm256_blendv_ps(m.step2_low, m.step2_high, above1);
    const I count2 = twice_and(bits(above1), _mm256_cmp_ps(x, bound2, _CMP_NLE_UQ));
    const F bound3 = _mm256_permutevar_ps(m.step3, count2);
    const I count3 = twice_and(count2, _mm256_cmp_ps(x, bound3, _CMP_NLE_UQ));
    const F bound4 = _mm256_permutevar8x32_ps(m.step4, count3);
    const I count4 = twice_and(count3, _mm256_cmp_ps(x, bound4, _CMP_NLE_UQ));
    return sub(_mm256_setzero_si256(), count4);
  }

  static constexpr bool kHasBins = false;
  struct Bins {};
  static Bins bins(const float*) { return {}; }

  using Bytes = __m256i;
  static Bytes bytes(const std::uint8_t* entries) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
  }
  // The upper bytes of an index are 0 and fetch entry 0, which is cut off.
  static I lookup_bytes(Bytes b, I index) {
    return bit_and(_mm256_shuffle_epi8(b, index), set1_int(0xFF));
  }

  // All ones in the first n of eight 32-bit lanes.
  static __m256i first_n(std::int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
  }

  // ---- the matrix products' words ----
  static constexpr bool kHasBf16Pairs = false;

  [[gnu::always_inline]] static void prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
  }
  [[gnu::always_inline]] static void prefetch_far(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
  }
  static I load_int(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store_int(void* p, I v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  static I load_int_n(const void* p, std::int64_t n) {
    return _mm256_maskload_epi32(static_cast<const int*>(p), first_n(n));
  }
  // Pairs of lanes, pairs of pairs, then the two halves: three rounds of eight shuffles.
  static void transpose(I (&row)[kWidth]) {
    I pair[8], quad[8];
    for (int i = 0; i < 8; i += 2) {
      pair[i] = _mm256_unpacklo_epi32(row[i], row[i + 1]);
      pair[i + 1] = _mm256_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      quad[i] = _mm256_unpacklo_epi64(pair[i], pair[i + 2]);
      quad[i + 1] = _mm256_unpackhi_epi64(pair[i], pair[i + 2]);
      quad[i + 2] = _mm256_unpacklo_epi64(pair[i + 1], pair[i + 3]);
      quad[i + 3] = _mm256_unpackhi_epi64(pair[i + 1], pair[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      row[i] = _mm256_permute2x128_si256(quad[i], quad[i + 4], 0x20);
      row[i + 4] = _mm256_permute2x128_si256(quad[i], quad[i + 4], 0x31);
    }
  }
  static F pick(const float* p, I index) { return _mm256_permutevar8x32_ps(load(p), index); }

  // ---- the few-rows linear layer's words ----
  struct BytePlanes {
    I plane[4];
  };
  static BytePlanes byte_planes(const float* entries) {
    BytePlanes result;
    std::uint8_t bytes[4][16];
    for (int i = 0; i < 16; ++i) {
      const auto bits = std::bit_cast<std::uint32_t>(entries[i]);
      for (int j = 0; j < 4; ++j) bytes[j][i] = static_cast<std::uint8_t>(bits >> (8 * j));
    }
    for (int j = 0; j < 4; ++j) result.plane[j] = Avx2::bytes(bytes[j]);
    return result;
  }
  static I first_codes(I words) {
    return _mm256_and_si256(_mm256_srli_epi16(words, 4), _mm256_set1_epi8(0xF));
  }
  static I second_codes(I words) { return _mm256_and_si256(words, _mm256_set1_epi8(0xF)); }
  static void lookup_planes(const BytePlanes& p, I codes, F (&values)[4]) {
    const I byte0 = _mm256_shuffle_epi8(p.plane[0], codes);
    const I byte1 = _mm256_shuffle_epi8(p.plane[1], codes);
    const I byte2 = _mm256_shuffle_epi8(p.plane[2], codes);
    const I byte3 = _mm256_shuffle_epi8(p.plane[3], codes);
    const I lower01 = _mm256_unpacklo_epi8(byte0, byte1);
    const I lower23 = _mm256_unpackhi_epi8(byte0, byte1);
    const I upper01 = _mm256_unpacklo_epi8(byte2, byte3);
    const I upper23 = _mm256_unpackhi_epi8(byte2, byte3);
    values[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(lower01, upper01));
    values[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(lower01, upper01));
    values[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(lower23, upper23));
    values[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(lower23, upper23));
  }

  // ---- dropout's words ----
  static I lane_index() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
  static I bit_xor(I a, I b) { return _mm256_xor_si256(a, b); }
  static I mul(I a, I b) { return _mm256_mullo_epi32(a, b); }
  template <int kBits>
  static I shift_right_zeros(I a) {
    return _mm256_srli_epi32(a, kBits);
  }
  static F keep_if_greater(F v, I a, I b) {
    return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpgt_epi32(a, b)));
  }
};

}  // namespace qlora::cpu
