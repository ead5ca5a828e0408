// The SIMD vocabulary in plain C++: the definition of each word, and the path of processors that have
// no vector path of their own. Four lanes in an array, which compilers turn into baseline SSE2 or NEON.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "qlora_native/types.h"

namespace qlora::cpu {

struct Scalar {
  static constexpr const char* kName = "scalar";
  static constexpr int kWidth = 4;

  struct F {
    float lane[kWidth];
  };

  template <class Op>
  static F map(Op op) {
    F result;
    for (int i = 0; i < kWidth; ++i) result.lane[i] = op(i);
    return result;
  }

  static F zero() { return set1(0.0f); }
  static F set1(float value) {
    return map([=](int) { return value; });
  }

  // ---- memory: fp32 as it is, fp16 and bf16 widened and rounded to nearest even ----
  template <class T>
  static F load(const T* p) {
    return map([=](int i) { return to_float(p[i]); });
  }
  template <class T>
  static void store(T* p, F v) {
    for (int i = 0; i < kWidth; ++i) p[i] = from_float<T>(v.lane[i]);
  }
  // The first n lanes, 0 <= n <= kWidth; the others are loaded as 0 and not stored.
  template <class T>
  static F load_n(const T* p, std::int64_t n) {
    return map([=](int i) { return i < n ? to_float(p[i]) : 0.0f; });
  }
  template <class T>
  static void store_n(T* p, F v, std::int64_t n) {
    for (int i = 0; i < n; ++i) p[i] = from_float<T>(v.lane[i]);
  }

  // ---- arithmetic ----
  static F add(F a, F b) {
    return map([=](int i) { return a.lane[i] + b.lane[i]; });
  }
  static F sub(F a, F b) {
    return map([=](int i) { return a.lane[i] - b.lane[i]; });
  }
  static F mul(F a, F b) {
    return map([=](int i) { return a.lane[i] * b.lane[i]; });
  }
  static F div(F a, F b) {
    return map([=](int i) { return a.lane[i] / b.lane[i]; });
  }
  static F sqrt(F a) {
    return map([=](int i) { return std::sqrt(a.lane[i]); });
  }
  static F abs(F a) {
    return map([=](int i) { return std::fabs(a.lane[i]); });
  }
  // a * b + c; fused where the processor has it, two roundings here.
  static F fma(F a, F b, F c) {
    return map([=](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  // The larger; b where either is NaN, as x86's max instructions give it.
  static F max(F a, F b) {
    return map([=](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }

  // ---- across lanes, in a fixed order ----
  static float reduce_add(F v) { return (v.lane[0] + v.lane[2]) + (v.lane[1] + v.lane[3]); }
  static float reduce_max(F v) {
    const float low = v.lane[0] > v.lane[2] ? v.lane[0] : v.lane[2];
    const float high = v.lane[1] > v.lane[3] ? v.lane[1] : v.lane[3];
    return low > high ? low : high;
  }
};

}  // namespace qlora::cpu
