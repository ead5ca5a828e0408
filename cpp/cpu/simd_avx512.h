// The SIMD vocabulary in AVX-512 (F, BW, DQ, VL): sixteen fp32 lanes, tails by mask registers.
// Words are defined in simd_scalar.h. Avx512Bf16 is the same with bf16 pair products.
#pragma once

#include <immintrin.h>

#include <bit>
#include <cstdint>
#include <cstring>

#include "qlora_native/types.h"
#include "simd_avx512_halves.h"

namespace qlora::cpu {

struct Avx512 : Avx512Halves {
  static constexpr const char* kName = "avx512";
  static constexpr int kWidth = 16;
  using F = __m512;
  using I = __m512i;

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float value) { return _mm512_set1_ps(value); }

  // ---- memory ----
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load(const Float16* p) { return widen_f16(_mm256_loadu_epi16(p)); }
  static F load(const BFloat16* p) { return widen_bf16(_mm256_loadu_epi16(p)); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static void stream(float* p, F v) { _mm512_stream_ps(p, v); }
  static void stream_fence() { _mm_sfence(); }
  static void store(Float16* p, F v) { _mm256_storeu_epi16(p, narrow_f16(v)); }
  static void store(BFloat16* p, F v) { _mm256_storeu_epi16(p, narrow_bf16(v)); }

  static F load_n(const float* p, std::int64_t n) { return _mm512_maskz_loadu_ps(first_n(n), p); }
  static F load_n(const Float16* p, std::int64_t n) {
    return widen_f16(_mm256_maskz_loadu_epi16(first_n(n), p));
  }
  static F load_n(const BFloat16* p, std::int64_t n) {
    return widen_bf16(_mm256_maskz_loadu_epi16(first_n(n), p));
  }
  static void store_n(float* p, F v, std::int64_t n) { _mm512_mask_storeu_ps(p, first_n(n), v); }
  static void store_n(Float16* p, F v, std::int64_t n) {
    _mm256_mask_storeu_epi16(p, first_n(n), narrow_f16(v));
  }
  static void store_n(BFloat16* p, F v, std::int64_t n) {
    _mm256_mask_storeu_epi16(p, first_n(n), narrow_bf16(v));
  }

  // ---- arithmetic ----
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F sqrt(F a) { return _mm512_sqrt_ps(a); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max_magnitude(F magnitude, F x) {
    return _mm512_castsi512_ps(_mm512_max_epi32(bits(magnitude), bits(abs(x))));
  }
  static F sign(F x) {
    const F positive = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, zero(), _CMP_GT_OQ), set1(1.0f));
    return _mm512_mask_mov_ps(positive, _mm512_cmp_ps_mask(x, zero(), _CMP_LT_OQ), set1(-1.0f));
  }
  static F where_finite(F test, F a, F b) {
    const F infinity = _mm512_set1_ps(__builtin_inff());
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(abs(test), infinity, _CMP_LT_OQ), b, a);
  }

  // ---- across lanes ----
  static float reduce_add(F v) {
    const __m256 x = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
  }
  static float reduce_max(F v) { return _mm512_reduce_max_ps(v); }

  static float reduce_max_magnitude(F v) {
    return std::bit_cast<float>(_mm512_reduce_max_epi32(bits(v)));
  }

  // ---- 32-bit integers ----
  static I set1_int(std::int32_t value) { return _mm512_set1_epi32(value); }
  static I bits(F v) { return _mm512_castps_si512(v); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
  static I max(I a, I b) { return _mm512_max_epi32(a, b); }
  template <int kBits>
  static I shift_right(I a) {
    return _mm512_srai_epi32(a, kBits);
  }
  static F to_floats(I a) { return _mm512_cvtepi32_ps(a); }
  static I truncate(F v) { return _mm512_cvttps_epi32(v); }
  static I count_above(I count, F x, F threshold) {
    const __mmask16 above = _mm512_cmp_ps_mask(x, threshold, _CMP_NLE_UQ);
    return _mm512_mask_add_epi32(count, above, count, set1_int(1));
  }

  // ---- bytes ----
  static I load_bytes(const std::uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store_bytes(std::uint8_t* p, I v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
  }

  // ---- 4-bit codes ----
  // The lower lanes take the first four bytes, the upper ones the last four, and every lane shifts
  // its own nibble to the bottom.
  static I unpack_codes(const std::uint8_t* packed) {
    std::int32_t first, last;
    std::memcpy(&first, packed, sizeof first);
    std::memcpy(&last, packed + 4, sizeof last);
    const I bytes = _mm512_mask_set1_epi32(set1_int(first), 0xFF00, last);
    return _mm512_srlv_epi32(
        bytes, _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24));
  }
  static constexpr bool kHasPairs = true;
  static void load_pairs(const BFloat16* p, F& first, F& second) {
    const I both = _mm512_loadu_si512(p);
    first = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    second = _mm512_castsi512_ps(_mm512_and_si512(both, set1_int(-0x10000)));
  }
  static void store_pairs(std::uint8_t* packed, I first, I second) {
    store_bytes(packed, _mm512_or_si512(_mm512_slli_epi32(first, 4), second));
  }
  static void pack_codes(std::uint8_t* packed, const I (&codes)[2]) {
    const __m256i nibbles = _mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm512_cvtepi32_epi8(codes[0])), _mm512_cvtepi32_epi8(codes[1]), 1);
    const __m256i pairs = _mm256_maddubs_epi16(nibbles, _mm256_set1_epi16(0x0110));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm256_cvtepi16_epi8(pairs));
  }

  using Table = F;
  static Table table(const float* entries) { return load(entries); }
  static Table scaled(Table t, float scale) { return mul(t, set1(scale)); }
  static F lookup(Table t, I codes) { return _mm512_permutexvar_ps(codes, t); }
  template <int kShift>
  static F lookup_at(Table t, I words) {
    return lookup(t, shift_right<kShift>(words));
  }

  // A binary search in four steps down a tree that lies in one register: node 1 is the root, below
  // node i are 2 i and 2 i + 1. After four steps a lane holds 16 + its count.
  using Midpoints = F;
  static Midpoints midpoints(const float* m) {
    return _mm512_setr_ps(0, m[7], m[3], m[11], m[1], m[5], m[9], m[13], m[0], m[2], m[4], m[6],
                          m[8], m[10], m[12], m[14]);
  }
  static I count_below(Midpoints m, F x) {
    I node = set1_int(1);
    for (int step = 0; step < 4; ++step) {
      const F bound = _mm512_permutexvar_ps(node, m);
      node = count_above(add(node, node), x, bound);
    }
    return bit_and(node, set1_int(0xF));
  }

  // x falls into one of 31 bins, which knows how many bounds lie below it and the one inside it.
  static constexpr bool kHasBins = true;
  struct Bins {
    F bound_low, bound_high;
    I below_low, below_high;
  };
  static constexpr float kHalfBins = 15.5f;
  static Bins bins(const float* bounds) {
    float bound[32];
    std::int32_t below[32];
    for (int bin = 0, next = 0; bin < 32; ++bin) {
      const bool inside =
          next < 15 && bounds[next] * kHalfBins + kHalfBins < static_cast<float>(bin + 1);
      below[bin] = next;
      bound[bin] = inside ? bounds[next++] : std::bit_cast<float>(0x7F800000);
    }
    return {load(bound), load(bound + 16), _mm512_loadu_si512(below),
            _mm512_loadu_si512(below + 16)};
  }
  static I count_below_binned(const Bins& b, F x) {
    const I bin = truncate(fma(x, set1(kHalfBins), set1(kHalfBins)));
    const F bound = _mm512_permutex2var_ps(b.bound_low, bin, b.bound_high);
    return count_above(_mm512_permutex2var_epi32(b.below_low, bin, b.below_high), x, bound);
  }

  using Bytes = __m512i;
  static Bytes bytes(const std::uint8_t* entries) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)));
  }
  // Three bytes in four of the index are 0 and would fetch entry 0: the mask leaves them 0.
  static I lookup_bytes(Bytes b, I index) {
    return _mm512_maskz_shuffle_epi8(0x1111111111111111, b, index);
  }

  static __mmask16 first_n(std::int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

  // ---- the matrix products' words ----
  static constexpr bool kHasBf16Pairs = false;

  [[gnu::always_inline]] static void prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
  }
  [[gnu::always_inline]] static void prefetch_far(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
  }
  static I load_int(const void* p) { return _mm512_loadu_si512(p); }
  static void store_int(void* p, I v) { _mm512_storeu_si512(p, v); }
  static I load_int_n(const void* p, std::int64_t n) {
    return _mm512_maskz_loadu_epi32(first_n(n), p);
  }
  // Pairs of lanes, pairs of pairs, then 128-bit quarters twice: four rounds of sixteen shuffles.
  static void transpose(I (&row)[kWidth]) {
    I pair[16], quad[16];
    for (int i = 0; i < 16; i += 2) {
      pair[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
      pair[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      quad[i] = _mm512_unpacklo_epi64(pair[i], pair[i + 2]);
      quad[i + 1] = _mm512_unpackhi_epi64(pair[i], pair[i + 2]);
      quad[i + 2] = _mm512_unpacklo_epi64(pair[i + 1], pair[i + 3]);
      quad[i + 3] = _mm512_unpackhi_epi64(pair[i + 1], pair[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      const I even_low = _mm512_shuffle_i32x4(quad[i], quad[i + 4], 0x88);
      const I odd_low = _mm512_shuffle_i32x4(quad[i], quad[i + 4], 0xDD);
      const I even_high = _mm512_shuffle_i32x4(quad[i + 8], quad[i + 12], 0x88);
      const I odd_high = _mm512_shuffle_i32x4(quad[i + 8], quad[i + 12], 0xDD);
      row[i] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
      row[i + 4] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
      row[i + 8] = _mm512_shuffle_i32x4(even_low, even_high, 0xDD);
      row[i + 12] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xDD);
    }
  }
  static F pick(const float* p, I index) { return _mm512_permutexvar_ps(index, load(p)); }

  // ---- dropout's words ----
  static I lane_index() {
    return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
  static I bit_xor(I a, I b) { return _mm512_xor_si512(a, b); }
  static I mul(I a, I b) { return _mm512_mullo_epi32(a, b); }
  template <int kBits>
  static I shift_right_zeros(I a) {
    return _mm512_srli_epi32(a, kBits);
  }
  static F keep_if_greater(F v, I a, I b) {
    return _mm512_maskz_mov_ps(_mm512_cmpgt_epi32_mask(a, b), v);
  }
};

#if defined(__AVX512BF16__)
struct Avx512Bf16 : Avx512 {
  static constexpr const char* kName = "avx512bf16";
  static constexpr bool kHasBf16Pairs = true;

  // A lane holds two bf16: lane i of `first` (rounded to nearest even, subnormals to zero) in its
  // lower half, lane i of `second` in its upper half.
  static I pack_pairs(F first, F second) {
    const I halves = reinterpret_cast<I>(_mm512_cvtne2ps_pbh(second, first));
    const I interleave =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(interleave, halves);
  }
  // sum + a.first * b.first + a.second * b.second, in fp32.
  static F dot_pairs(F sum, I a, I b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }

  // ---- the few-rows linear layer's words ----
  using PairTable = I;
  static PairTable pair_table(Table t, float first, float second) {
    return reinterpret_cast<I>(_mm512_cvtne2ps_pbh(scaled(t, second), scaled(t, first)));
  }
  static I lookup_pairs(PairTable t, I codes) {
    const I upper_half = _mm512_mask_set1_epi32(set1_int(0), 0xFF00, 0x00100010);
    constexpr int kFirstAndSecondOrThird = 0xEA;
    const I index =
        _mm512_ternarylogic_epi32(codes, set1_int(0x000F000F), upper_half, kFirstAndSecondOrThird);
    return _mm512_permutexvar_epi16(index, t);
  }
};
#endif

}  // namespace qlora::cpu
