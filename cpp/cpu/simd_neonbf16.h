// NEON with the pair products of FEAT_BF16 (Armv8.6, optional from 8.2).
#pragma once

#include "simd_neon.h"

namespace qlora::cpu {

struct NeonBf16 : Neon {
  static constexpr const char* kName = "neonbf16";
  static constexpr bool kHasBf16Pairs = true;

  // A lane holds two bf16: lane i of `first` (rounded to nearest even) in its lower half, lane i of
  // `second` in its upper half.
  static I pack_pairs(F first, F second) {
    const uint16x8_t lower = convert(first), upper = convert(second);
    return {vreinterpretq_s32_u16(vzip1q_u16(lower, upper)),
            vreinterpretq_s32_u16(vzip2q_u16(lower, upper))};
  }
  // sum + a.first * b.first + a.second * b.second, in fp32 (BFDOT takes subnormals for zero).
  static F dot_pairs(F sum, I a, I b) {
    const auto pairs = [](int32x4_t v) { return vreinterpretq_bf16_s32(v); };
    return {vbfdotq_f32(sum.low, pairs(a.low), pairs(b.low)),
            vbfdotq_f32(sum.high, pairs(a.high), pairs(b.high))};
  }

 private:
  static uint16x8_t convert(F v) {
    return vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(v.low), v.high));
  }
};

}  // namespace qlora::cpu
