// Blockwise 8-bit quantization to the dynamic maps, and double quantization of scales, which is the
// same on absmax less its mean, in blocks of 256.
//
// Rounding `nearest` is codes_8bit_inl.h's. `bitsandbytes_cpu` gives what that package gives on a
// CPU: it looks codes up in a table of 65,536 steps over [-1, 1], so a value first goes to its
// step,
//
//   step = trunc(((x + 1) * 0.5) * 65535 + 0.5),   x' = -1 + (2 * step) / 65535,
//
// and the code is the one nearest to x' (no x' is a midpoint, so the rule for ties does not
// matter).
//
// The two also differ in blocks that are no ordinary numbers. Nearest: x * (1 / max(absmax,
// 1e-38)), and a NaN makes its block's absmax NaN. bitsandbytes_cpu: x * (1 / absmax), absmax over
// the values that are not NaN, and code 0 for NaN, so also for all of a block of zeros.
#pragma once

#include <cstdint>

#include "codes_8bit_inl.h"
#include "parallel.h"
#include "qlora_native/backend.h"
#include "qlora_native/dispatch.h"
#include "qlora_native/layout.h"
#include "quantize_4bit_inl.h"

namespace qlora::cpu {

// The value of x's step in bitsandbytes' table; NaN counts as -1.
template <class V>
typename V::F to_table_step(typename V::F x) {
  const auto one = V::set1(1.0f);
  const auto clamped = V::min(V::max(x, V::set1(-1.0f)), one);
  const auto unit = V::mul(V::add(clamped, one), V::set1(0.5f));
  const auto scaled = V::add(V::mul(unit, V::set1(65535.0f)), V::set1(0.5f));
  const auto step = V::to_floats(V::truncate(scaled));
  return V::sub(V::div(V::mul(V::set1(2.0f), step), V::set1(65535.0f)), one);
}

// Vector i of a block that is `count` values long, less the offset; lanes past the end hold 0.
template <class V, bool kOffset, class T>
[[gnu::always_inline]] inline typename V::F load_less(const T* x, std::int64_t i,
                                                      std::int64_t count, typename V::F offset) {
  if constexpr (!kOffset) {
    return i + V::kWidth <= count ? V::load(x + i) : V::load_n(x + i, count - i);
  }
  if (i + V::kWidth <= count) return V::sub(V::load(x + i), offset);
  float rest[V::kWidth];
  V::store(rest, offset);
  V::store_n(rest, V::load_n(x + i, count - i), count - i);
  return V::sub(V::load(rest), offset);
}

template <class V, bool kSigned, bool kOffset, CodeRounding kRounding, class T>
void encode_block_8bit(const T* x, std::int64_t count, typename V::F offset, std::uint8_t* codes,
                       float* absmax) {
  using F = typename V::F;
  constexpr bool kNearest = kRounding == CodeRounding::nearest;

  F largest = V::zero();
#pragma GCC unroll 4
  for (std::int64_t i = 0; i < count; i += V::kWidth) {
    const F v = load_less<V, kOffset>(x, i, count, offset);
    largest = kNearest ? V::max_magnitude(largest, v) : V::max(V::abs(v), largest);
  }
  *absmax = V::reduce_max_magnitude(largest);
  const bool tiny = kNearest && *absmax < kSmallestDivisor;
  const F factor = V::set1(1.0f / (tiny ? kSmallestDivisor : *absmax));
  const bool finite = kNearest && *absmax <= kLargestFloat;

  for (std::int64_t begin = 0; begin < count; begin += kRun8bit) {
    const std::int64_t rest = count - begin;
    const auto value = [&](std::int64_t i) __attribute__((always_inline)) {
      const F normed = V::mul(load_less<V, kOffset>(x, begin + i, count, offset), factor);
      return kNearest ? normed : to_table_step<V>(normed);
    };
    encode_8bit<V, kSigned>(value, rest < kRun8bit ? rest : kRun8bit, finite, codes + begin);
  }
}

template <class V, bool kSigned, bool kOffset, CodeRounding kRounding>
void encode_8bit_blocks(const Quantize8bitParams& p, float offset, const Context& context) {
  const auto run = [&](std::int64_t begin, std::int64_t end) {
    with_type(p.dtype, [&]<class T>() {
      for (std::int64_t block = begin; block < end; ++block) {
        const std::int64_t first = block * p.blocksize;
        const std::int64_t rest = p.n - first;
        encode_block_8bit<V, kSigned, kOffset, kRounding>(
            static_cast<const T*>(p.x) + first, rest < p.blocksize ? rest : p.blocksize,
            V::set1(offset), p.codes + first, &p.absmax[block]);
      }
    });
  };
  parallel_for(context, n_blocks(p.n, p.blocksize), ceil_div(kQuantizeGrain, p.blocksize), run);
}

template <class V, bool kOffset>
void encode_8bit_blocks(const Quantize8bitParams& p, float offset, const Context& context) {
  const auto with_rounding = [&]<bool kSigned>() {
    if (p.rounding == CodeRounding::nearest) {
      encode_8bit_blocks<V, kSigned, kOffset, CodeRounding::nearest>(p, offset, context);
    } else {
      encode_8bit_blocks<V, kSigned, kOffset, CodeRounding::bitsandbytes_cpu>(p, offset, context);
    }
  };
  if (p.is_signed) return with_rounding.template operator()<true>();
  with_rounding.template operator()<false>();
}

template <class V>
Status quantize_8bit(const Quantize8bitParams& p, const Context& context) {
  encode_8bit_blocks<V, false>(p, 0.0f, context);
  return {};
}

// In fp64 over eight interleaved sums: one order of additions, whatever the threads and the ISA.
// (torch's mean depends on both, so a caller who needs its bits passes them in as `offset`.)
template <class V>
float mean(const float* x, std::int64_t n) {
  if (n == 0) return 0.0f;
  constexpr int kSums = 8;
  double sums[kSums] = {};
  std::int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int j = 0; j < kSums; ++j) sums[j] += static_cast<double>(x[i + j]);
  }
  double sum = 0.0;
  for (; i < n; ++i) sum += static_cast<double>(x[i]);
  for (const double part : sums) sum += part;
  return static_cast<float>(sum / static_cast<double>(n));
}

template <class V>
Status quantize_scales(const QuantizeScalesParams& p, const Context& context) {
  *p.nested_offset = p.offset != nullptr ? *p.offset : mean<V>(p.absmax, p.n);
  encode_8bit_blocks<V, true>(p.as_8bit(), *p.nested_offset, context);
  return {};
}

}  // namespace qlora::cpu
