// The SIMD vocabulary in NEON (AArch64's baseline): eight fp32 lanes, in two registers. Words are
// defined in simd_scalar.h.
//
// Two registers and not one, for AVX2's tiles then fit as they are: 6 x 16 sums are 24 of the 32
// registers, 4 hold the panel. A table look-up (TBL) reads bytes from up to 64 of them, that is all
// sixteen floats of a 4-bit format: one look-up gives four lanes, and needs no second one for a
// half of the table, as AVX2 does. Choices here go by the count of instructions: it was tested in
// an emulator and has not been measured on a processor.
#pragma once

#include <arm_neon.h>

#include <bit>
#include <cstdint>
#include <cstring>

#include "qlora_native/types.h"
#include "simd_neon_halves.h"

namespace qlora::cpu {

struct Neon : NeonHalves {
  static constexpr const char* kName = "neon";
  static constexpr int kWidth = 8;
  struct F {
    float32x4_t low, high;
  };
  struct I {
    int32x4_t low, high;
  };

  static F zero() { return set1(0.0f); }
  static F set1(float value) { return {vdupq_n_f32(value), vdupq_n_f32(value)}; }

  // ---- memory ----
  static F load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  template <class T>
  static F load(const T* p) {
    const uint16x8_t v = load_bits(p);
    return {widen(T{}, vget_low_u16(v)), widen(T{}, vget_high_u16(v))};
  }
  static void store(float* p, F v) {
    vst1q_f32(p, v.low);
    vst1q_f32(p + 4, v.high);
  }
  static void stream(float* p, F v) { store(p, v); }
  static void stream_fence() {}
  template <class T>
  static void store(T* p, F v) {
    vst1q_u16(reinterpret_cast<std::uint16_t*>(p), narrow(T{}, v.low, v.high));
  }
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
  static F add(F a, F b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
  static F sub(F a, F b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
  static F mul(F a, F b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
  static F div(F a, F b) { return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
  static F sqrt(F a) { return {vsqrtq_f32(a.low), vsqrtq_f32(a.high)}; }
  static F abs(F a) { return {vabsq_f32(a.low), vabsq_f32(a.high)}; }
  static F fma(F a, F b, F c) {
    return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
  }
  // Not by FMAX and FMIN, which give NaN where either is one.
  static F max(F a, F b) {
    return choose(vcgtq_f32(a.low, b.low), vcgtq_f32(a.high, b.high), a, b);
  }
  static F min(F a, F b) {
    return choose(vcltq_f32(a.low, b.low), vcltq_f32(a.high, b.high), a, b);
  }
  static F max_magnitude(F magnitude, F x) { return floats(max(bits(magnitude), bits(abs(x)))); }
  static F sign(F x) {
    const F one = set1(1.0f);
    const F positive = choose(vcgtzq_f32(x.low), vcgtzq_f32(x.high), one, zero());
    return choose(vcltzq_f32(x.low), vcltzq_f32(x.high), set1(-1.0f), positive);
  }
  static F where_finite(F test, F a, F b) {
    const float32x4_t infinity = vdupq_n_f32(__builtin_inff());
    return choose(vcaltq_f32(test.low, infinity), vcaltq_f32(test.high, infinity), a, b);
  }

  // ---- across lanes ----
  static float reduce_add(F v) {
    const float32x4_t four = vaddq_f32(v.low, v.high);
    return vaddv_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)));
  }
  static float reduce_max_magnitude(F v) {
    return std::bit_cast<float>(vmaxvq_s32(vmaxq_s32(bits(v).low, bits(v).high)));
  }

  // ---- 32-bit integers ----
  static I set1_int(std::int32_t value) { return {vdupq_n_s32(value), vdupq_n_s32(value)}; }
  static I bits(F v) { return {vreinterpretq_s32_f32(v.low), vreinterpretq_s32_f32(v.high)}; }
  static F floats(I v) { return {vreinterpretq_f32_s32(v.low), vreinterpretq_f32_s32(v.high)}; }
  static I add(I a, I b) { return {vaddq_s32(a.low, b.low), vaddq_s32(a.high, b.high)}; }
  static I sub(I a, I b) { return {vsubq_s32(a.low, b.low), vsubq_s32(a.high, b.high)}; }
  static I bit_and(I a, I b) { return {vandq_s32(a.low, b.low), vandq_s32(a.high, b.high)}; }
  static I max(I a, I b) { return {vmaxq_s32(a.low, b.low), vmaxq_s32(a.high, b.high)}; }
  template <int kBits>
  static I shift_right(I a) {
    if constexpr (kBits == 0)
      return a;  // no shift instruction takes 0
    else
      return {vshrq_n_s32(a.low, kBits), vshrq_n_s32(a.high, kBits)};
  }
  static F to_floats(I a) { return {vcvtq_f32_s32(a.low), vcvtq_f32_s32(a.high)}; }
  static I truncate(F v) { return {vcvtq_s32_f32(v.low), vcvtq_s32_f32(v.high)}; }
  static I count_above(I count, F x, F threshold) {
    const auto above = [](float32x4_t a, float32x4_t b) {
      return vreinterpretq_s32_u32(vmvnq_u32(vcleq_f32(a, b)));
    };
    return {vsubq_s32(count.low, above(x.low, threshold.low)),
            vsubq_s32(count.high, above(x.high, threshold.high))};
  }

  // ---- bytes ----
  static I load_bytes(const std::uint8_t* p) {
    const uint16x8_t words = vmovl_u8(vld1_u8(p));
    return {vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(words))),
            vreinterpretq_s32_u32(vmovl_high_u16(words))};
  }
  static void store_bytes(std::uint8_t* p, I v) { vst1_u8(p, vmovn_u16(lower_halves(v))); }

  // ---- 4-bit codes ----
  // Every lane takes all four bytes and shifts its own nibble to the bottom.
  static I unpack_codes(const std::uint8_t* packed) {
    std::uint32_t bytes;
    std::memcpy(&bytes, packed, sizeof bytes);
    const uint32x4_t all = vdupq_n_u32(bytes);
    return {vreinterpretq_s32_u32(vshlq_u32(all, int32x4_t{-4, 0, -12, -8})),
            vreinterpretq_s32_u32(vshlq_u32(all, int32x4_t{-20, -16, -28, -24}))};
  }
  static constexpr bool kHasPairs = false;
  static void pack_codes(std::uint8_t* packed, const I (&codes)[4]) {
    store_nibbles(packed, lower_bytes(lower_halves(codes[0]), lower_halves(codes[1])),
                  lower_bytes(lower_halves(codes[2]), lower_halves(codes[3])));
  }

  using Table = uint8x16x4_t;
  static Table table(const float* entries) {
    Table result;
    for (int i = 0; i < 4; ++i) result.val[i] = vreinterpretq_u8_f32(vld1q_f32(entries + 4 * i));
    return result;
  }
  static Table scaled(const Table& t, float scale) {
    Table result;
    for (int i = 0; i < 4; ++i) {
      const float32x4_t entries = vreinterpretq_f32_u8(t.val[i]);
      result.val[i] = vreinterpretq_u8_f32(vmulq_f32(entries, vdupq_n_f32(scale)));
    }
    return result;
  }
  // Three instructions for four lanes: the code alone, its entry's bytes, the look-up.
  static F lookup(const Table& t, I codes) {
    const auto four = [&t](int32x4_t lanes) {
      const int32x4_t code = vandq_s32(lanes, vdupq_n_s32(0xF));
      return vreinterpretq_f32_u8(vqtbl4q_u8(t, bytes_of_entry(code)));
    };
    return {four(codes.low), four(codes.high)};
  }

  // Eight of these for one vector of words share a shift and a mask four by four: they leave 4 *
  // code in every byte. Then one byte is copied to all of its lane, joined with the number of the
  // byte it will fetch, and looked up: three instructions, and none is a multiplication.
  template <int kShift>
  static F lookup_at(const Table& t, I words) {
    constexpr std::uint32_t kByte = kShift / 8 * 0x01010101;
    const uint8x16_t copies = vreinterpretq_u8_u32(
        uint32x4_t{kByte, kByte + 0x04040404, kByte + 0x08080808, kByte + 0x0C0C0C0C});
    const uint8x16_t byte_number = vreinterpretq_u8_u32(vdupq_n_u32(0x03020100));
    const auto four = [&](int32x4_t lanes) {
      const uint8x16_t bytes = vreinterpretq_u8_s32(lanes);
      const uint8x16_t moved = kShift % 8 == 4 ? vshrq_n_u8(bytes, 2) : vshlq_n_u8(bytes, 2);
      const uint8x16_t entries = vandq_u8(moved, vdupq_n_u8(0x3C));
      const uint8x16_t at = vorrq_u8(vqtbl1q_u8(entries, copies), byte_number);
      return vreinterpretq_f32_u8(vqtbl4q_u8(t, at));
    };
    return {four(words.low), four(words.high)};
  }

  // The lower and the upper bytes of the entries apart: one look-up gives sixteen of either.
  struct HalfTable {
    uint8x16_t lower, upper;
  };
  template <class T>
  static HalfTable half_table(const Table& t) {
    const auto entries = [&t](int first) {
      return vreinterpretq_u8_u16(
          narrow(T{}, vreinterpretq_f32_u8(t.val[first]), vreinterpretq_f32_u8(t.val[first + 1])));
    };
    return {vuzp1q_u8(entries(0), entries(2)), vuzp2q_u8(entries(0), entries(2))};
  }
  // Stored as they lie in registers: the interleaving stores (ST2, ST4) are slow on many cores.
  static constexpr int kDecoded = 32;
  template <bool kStream, class T>
  static void store_decoded(T* out, const HalfTable& t, const std::uint8_t* packed) {
    const uint8x16_t bytes = vld1q_u8(packed);
    const uint8x16_t first = vshrq_n_u8(bytes, 4), second = vandq_u8(bytes, vdupq_n_u8(0xF));
    const auto sixteen = [&t](T* to, uint8x16_t codes) {
      const uint8x16_t lower = vqtbl1q_u8(t.lower, codes), upper = vqtbl1q_u8(t.upper, codes);
      auto* halves = reinterpret_cast<std::uint16_t*>(to);
      vst1q_u16(halves, vreinterpretq_u16_u8(vzip1q_u8(lower, upper)));
      vst1q_u16(halves + 8, vreinterpretq_u16_u8(vzip2q_u8(lower, upper)));
    };
    sixteen(out, vzip1q_u8(first, second));
    sixteen(out + 16, vzip2q_u8(first, second));
  }

  // A binary search in four steps. A comparison (x <= bound, false for NaN) gives all ones or none,
  // and of it one bit is kept, in every byte of the lane: step 1 is bit 3, step 2 bit 2, and step 3
  // bit 4. With a byte's own number in bits 0 and 1 that is where the next step's bound lies in its
  // table.
  struct Midpoints {
    float32x4_t step1, step2_low, step2_high;
    uint8x16_t step3;
    uint8x16x2_t step4;
  };
  static Midpoints midpoints(const float* m) {
    const auto four = [m](int a, int b, int c, int d) {
      return vreinterpretq_u8_f32(float32x4_t{m[a], m[b], m[c], m[d]});
    };
    return {vdupq_n_f32(m[7]),
            vdupq_n_f32(m[3]),
            vdupq_n_f32(m[11]),
            four(13, 9, 5, 1),
            {{four(14, 10, 6, 2), four(12, 8, 4, 0)}}};
  }
  static I count_below(const Midpoints& m, F x) {
    const auto four = [&m](float32x4_t v) {
      const uint32x4_t below1 = vcleq_f32(v, m.step1);
      const uint32x4_t below2 = vcleq_f32(v, vbslq_f32(below1, m.step2_low, m.step2_high));
      uint32x4_t at = vdupq_n_u32(0x03020100);
      at = insert(at, 0x08080808, below1);
      at = insert(at, 0x04040404, below2);
      const uint8x16_t bound3 = vqtbl1q_u8(m.step3, vreinterpretq_u8_u32(at));
      const uint32x4_t below3 = vcleq_f32(v, vreinterpretq_f32_u8(bound3));
      at = insert(at, 0x10101010, below3);
      const uint8x16_t bound4 = vqtbl2q_u8(m.step4, vreinterpretq_u8_u32(at));
      const uint32x4_t below4 = vcleq_f32(v, vreinterpretq_f32_u8(bound4));
      const uint32x4_t not_below = insert(insert(at, 2, below3), 1, below4);
      return vreinterpretq_s32_u32(vbicq_u32(vdupq_n_u32(0xF), not_below));
    };
    return {four(x.low), four(x.high)};
  }

  static constexpr bool kHasBins = false;
  struct Bins {};
  static Bins bins(const float*) { return {}; }

  static constexpr bool kHasHalfTables = false;

  using Bytes = uint8x16_t;
  static Bytes bytes(const std::uint8_t* entries) { return vld1q_u8(entries); }
  // The upper bytes of an index are 0 and fetch entry 0, which is cut off.
  static I lookup_bytes(Bytes b, I index) {
    const auto four = [b](int32x4_t i) {
      return vreinterpretq_s32_u8(vqtbl1q_u8(b, vreinterpretq_u8_s32(i)));
    };
    return bit_and({four(index.low), four(index.high)}, set1_int(0xFF));
  }

  // ---- the matrix products' words ----
  static constexpr bool kHasBf16Pairs = false;

  [[gnu::always_inline]] static void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
  [[gnu::always_inline]] static void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }
  static I load_int(const void* p) {
    const auto* bytes = static_cast<const std::uint8_t*>(p);
    return {vreinterpretq_s32_u8(vld1q_u8(bytes)), vreinterpretq_s32_u8(vld1q_u8(bytes + 16))};
  }
  static void store_int(void* p, I v) {
    auto* bytes = static_cast<std::uint8_t*>(p);
    vst1q_u8(bytes, vreinterpretq_u8_s32(v.low));
    vst1q_u8(bytes + 16, vreinterpretq_u8_s32(v.high));
  }
  static I load_int_n(const void* p, std::int64_t n) {
    std::int32_t buffer[kWidth] = {};
    std::memcpy(buffer, p, static_cast<std::size_t>(n) * sizeof(std::int32_t));
    return load_int(buffer);
  }
  // Four squares of 4 x 4, of which the two off the diagonal change places.
  static void transpose(I (&row)[kWidth]) {
    for (int i = 0; i < 4; ++i) {
      const int32x4_t upper_right = row[i].high;
      row[i].high = row[i + 4].low;
      row[i + 4].low = upper_right;
    }
    for (I* four : {row, row + 4}) {
      transpose_square(four[0].low, four[1].low, four[2].low, four[3].low);
      transpose_square(four[0].high, four[1].high, four[2].high, four[3].high);
    }
  }
  static F pick(const float* p, I index) {
    const uint8x16x2_t eight = {
        {vreinterpretq_u8_f32(vld1q_f32(p)), vreinterpretq_u8_f32(vld1q_f32(p + 4))}};
    return {vreinterpretq_f32_u8(vqtbl2q_u8(eight, bytes_of_entry(index.low))),
            vreinterpretq_f32_u8(vqtbl2q_u8(eight, bytes_of_entry(index.high)))};
  }

  // ---- dropout's words ----
  static I lane_index() { return {int32x4_t{0, 1, 2, 3}, int32x4_t{4, 5, 6, 7}}; }
  static I bit_xor(I a, I b) { return {veorq_s32(a.low, b.low), veorq_s32(a.high, b.high)}; }
  static I mul(I a, I b) { return {vmulq_s32(a.low, b.low), vmulq_s32(a.high, b.high)}; }
  template <int kBits>
  static I shift_right_zeros(I a) {
    const auto four = [](int32x4_t v) {
      return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(v), kBits));
    };
    return {four(a.low), four(a.high)};
  }
  static F keep_if_greater(F v, I a, I b) {
    return choose(vcgtq_s32(a.low, b.low), vcgtq_s32(a.high, b.high), v, zero());
  }

 private:
  // a where the mask is set, else b.
  static F choose(uint32x4_t low, uint32x4_t high, F a, F b) {
    return {vbslq_f32(low, a.low, b.low), vbslq_f32(high, a.high, b.high)};
  }

  // `into`, with the bits that `where` names taken from `from`.
  static uint32x4_t insert(uint32x4_t into, std::uint32_t where, uint32x4_t from) {
    return vbslq_u32(vdupq_n_u32(where), from, into);
  }

  // Where the four bytes of each lane's entry lie in a table of fp32: 4 * entry + {0, 1, 2, 3}.
  static uint8x16_t bytes_of_entry(int32x4_t entry) {
    return vreinterpretq_u8_s32(vmlaq_s32(vdupq_n_s32(0x03020100), entry, vdupq_n_s32(0x04040404)));
  }

  static uint16x8_t lower_halves(I v) {
    return vuzp1q_u16(vreinterpretq_u16_s32(v.low), vreinterpretq_u16_s32(v.high));
  }

  // Pairs of lanes, then pairs of pairs.
  static void transpose_square(int32x4_t& a, int32x4_t& b, int32x4_t& c, int32x4_t& d) {
    const int64x2_t ab_even = vreinterpretq_s64_s32(vtrn1q_s32(a, b));
    const int64x2_t ab_odd = vreinterpretq_s64_s32(vtrn2q_s32(a, b));
    const int64x2_t cd_even = vreinterpretq_s64_s32(vtrn1q_s32(c, d));
    const int64x2_t cd_odd = vreinterpretq_s64_s32(vtrn2q_s32(c, d));
    a = vreinterpretq_s32_s64(vtrn1q_s64(ab_even, cd_even));
    b = vreinterpretq_s32_s64(vtrn1q_s64(ab_odd, cd_odd));
    c = vreinterpretq_s32_s64(vtrn2q_s64(ab_even, cd_even));
    d = vreinterpretq_s32_s64(vtrn2q_s64(ab_odd, cd_odd));
  }
};

}  // namespace qlora::cpu
