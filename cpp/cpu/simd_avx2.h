// The SIMD vocabulary in AVX2 + FMA + F16C: eight fp32 lanes. Words are defined in simd_scalar.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "qlora_native/types.h"

namespace qlora::cpu {

struct Avx2 {
  static constexpr const char* kName = "avx2";
  static constexpr int kWidth = 8;
  using F = __m256;

  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float value) { return _mm256_set1_ps(value); }

  // ---- memory ----
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load(const Float16* p) { return widen_f16(load_bits(p)); }
  static F load(const BFloat16* p) { return widen_bf16(load_bits(p)); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
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

  // ---- 16-bit elements ----
  template <class T>
  static __m128i load_bits(const T* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  template <class T>
  static void store_bits(T* p, __m128i bits) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bits);
  }
  static F widen_f16(__m128i bits) { return _mm256_cvtph_ps(bits); }
  static F widen_bf16(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static __m128i narrow_f16(F v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  // Round to nearest even in integers; a NaN keeps its upper bits and is made quiet.
  static __m128i narrow_bf16(F v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 is_nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256i chosen = _mm256_castps_si256(_mm256_blendv_ps(
        _mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), is_nan));
    const __m256i high = _mm256_srli_epi32(chosen, 16);
    const __m256i packed = _mm256_packus_epi32(high, high);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000));
  }

  // All ones in the first n of eight 32-bit lanes.
  static __m256i first_n(std::int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane);
  }
};

}  // namespace qlora::cpu
