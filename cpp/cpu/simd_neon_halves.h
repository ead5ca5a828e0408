// NEON's words on 16-bit elements: conversions, and lanes of 16 bits. Words are defined in
// simd_scalar.h.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "qlora_native/types.h"

namespace qlora::cpu {

struct NeonHalves {
  // ---- conversions, of eight elements ----
  template <class T>
  static uint16x8_t load_bits(const T* p) {
    return vld1q_u16(reinterpret_cast<const std::uint16_t*>(p));
  }
  static float32x4_t widen(Float16, uint16x4_t bits) {
    return vcvt_f32_f16(vreinterpret_f16_u16(bits));
  }
  static float32x4_t widen(BFloat16, uint16x4_t bits) {
    return vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
  }
  // Rounded to nearest even; the first argument names the type.
  static uint16x8_t narrow(Float16, float32x4_t low, float32x4_t high) {
    return vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(low), high));
  }
  static uint16x8_t narrow(BFloat16, float32x4_t low, float32x4_t high) {
    return vcombine_u16(narrow_bf16(low), narrow_bf16(high));
  }

  // ---- 16-bit elements, by their bits ----
  static constexpr int kHalves = 16;
  struct H {
    int16x8_t low, high;
  };
  static H zero_halves() { return {vdupq_n_s16(0), vdupq_n_s16(0)}; }
  static float widen(Float16 value) {
    return vgetq_lane_f32(widen(value, vdup_n_u16(value.bits)), 0);
  }
  static float widen(BFloat16 value) { return to_float(value); }
  template <class T>
  static H max_magnitude_halves(H magnitude, const T* p) {
    return {vmaxq_s16(magnitude.low, without_sign(load_bits(p))),
            vmaxq_s16(magnitude.high, without_sign(load_bits(p + 8)))};
  }
  static std::uint16_t reduce_max_halves(H v) {
    return static_cast<std::uint16_t>(vmaxvq_s16(vmaxq_s16(v.low, v.high)));
  }

  // ---- a 16-bit type's values against bounds of the same type ----
  static constexpr bool kHasHalfBounds = true;

  template <class T>
  static H load_ordered(const T* p) {
    return {ordered(load_bits(p)), ordered(load_bits(p + 8))};
  }
  // The midpoints in the order in which the search wants its bounds: those of step 4; then those of
  // step 3 in every other place, and steps 1 and 2 between them.
  struct HalfMidpoints {
    float32x4_t m[4];
  };
  static HalfMidpoints half_midpoints(const float* m) {
    return {{float32x4_t{m[0], m[2], m[4], m[6]}, float32x4_t{m[8], m[10], m[12], m[14]},
             float32x4_t{m[1], m[7], m[5], m[3]}, float32x4_t{m[9], m[11], m[13], m[7]}}};
  }
  template <class T>
  static void store_half_bounds(std::int16_t* bounds, const HalfMidpoints& midpoints, float divisor,
                                float factor) {
    for (int i = 0; i < 4; i += 2) {
      const float32x4_t low = midpoints.m[i], high = midpoints.m[i + 1];
      const uint16x8_t nearest =
          narrow(T{}, vmulq_f32(low, vdupq_n_f32(divisor)), vmulq_f32(high, vdupq_n_f32(divisor)));
      const auto too_high = [factor](uint16x4_t value, float32x4_t midpoint) {
        const float32x4_t product = vmulq_f32(widen(T{}, value), vdupq_n_f32(factor));
        return vmovn_u32(vcgtq_f32(product, midpoint));
      };
      const uint16x8_t one_less = vcombine_u16(too_high(vget_low_u16(nearest), low),
                                               too_high(vget_high_u16(nearest), high));
      vst1q_s16(bounds + 4 * i, vaddq_s16(ordered(nearest), vreinterpretq_s16_u16(one_less)));
    }
  }
  struct HalfBounds {
    int16x8_t step1, step2_low, step2_high;
    uint8x16_t step3, step4;
  };
  static HalfBounds load_half_bounds(const std::int16_t* bounds) {
    return {vdupq_n_s16(bounds[9]), vdupq_n_s16(bounds[11]), vdupq_n_s16(bounds[13]),
            vreinterpretq_u8_s16(vld1q_s16(bounds + 8)), vreinterpretq_u8_s16(vld1q_s16(bounds))};
  }
  // A binary search in four steps. A comparison gives all ones or none; of steps 1, 2 and 3 the
  // bits 3, 2 and 1 are kept in both bytes of the lane, which with the byte's own number in bit 0
  // is where the next step's bound lies. Step 4 takes the place of the lower byte's number: that
  // byte is the count, and the upper one is left as it is.
  static H count_above_bounds(const HalfBounds& b, H x) {
    const auto eight = [&b](int16x8_t v) {
      const uint16x8_t above1 = vcgtq_s16(v, b.step1);
      const uint16x8_t above2 = vcgtq_s16(v, vbslq_s16(above1, b.step2_high, b.step2_low));
      uint16x8_t at = insert(insert(vdupq_n_u16(0x0100), 0x0808, above1), 0x0404, above2);
      const uint16x8_t above3 = vcgtq_s16(v, bound_at(b.step3, at));
      at = insert(at, 0x0202, above3);
      const uint16x8_t above4 = vcgtq_s16(v, bound_at(b.step4, at));
      return vreinterpretq_s16_u16(insert(at, 0x0001, above4));
    };
    return {eight(x.low), eight(x.high)};
  }
  static void pack_counts(std::uint8_t* packed, const H (&counts)[2], uint8x16_t order) {
    const auto codes = [order](H v) {
      return vqtbl1q_u8(order,
                        lower_bytes(vreinterpretq_u16_s16(v.low), vreinterpretq_u16_s16(v.high)));
    };
    store_nibbles(packed, codes(counts[0]), codes(counts[1]));
  }

 protected:
  static uint8x16_t lower_bytes(uint16x8_t a, uint16x8_t b) {
    return vuzp1q_u8(vreinterpretq_u8_u16(a), vreinterpretq_u8_u16(b));
  }
  // Thirty-two codes, a byte each, to sixteen bytes: the even ones are moved above the odd ones.
  static void store_nibbles(std::uint8_t* packed, uint8x16_t first, uint8x16_t last) {
    vst1q_u8(packed, vsliq_n_u8(vuzp2q_u8(first, last), vuzp1q_u8(first, last), 4));
  }

 private:
  // In integers; a NaN keeps its upper bits and is made quiet.
  static uint16x4_t narrow_bf16(float32x4_t v) {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16);
  }

  static int16x8_t without_sign(uint16x8_t bits) {
    return vreinterpretq_s16_u16(vandq_u16(bits, vdupq_n_u16(0x7FFF)));
  }
  // Sign and magnitude to an integer: ascending as the values do, -0 as 0.
  static int16x8_t ordered(uint16x8_t bits) {
    const int16x8_t sign = vshrq_n_s16(vreinterpretq_s16_u16(bits), 15);
    return vsubq_s16(veorq_s16(without_sign(bits), sign), sign);
  }
  // `into`, with the bits that `where` names taken from `from`.
  static uint16x8_t insert(uint16x8_t into, std::uint16_t where, uint16x8_t from) {
    return vbslq_u16(vdupq_n_u16(where), from, into);
  }
  static int16x8_t bound_at(uint8x16_t bounds, uint16x8_t at) {
    return vreinterpretq_s16_u8(vqtbl1q_u8(bounds, vreinterpretq_u8_u16(at)));
  }
};

}  // namespace qlora::cpu
