// The SIMD vocabulary in plain C++: the definition of each word, and the path of processors that
// have no vector path of their own. Four lanes in one of the compiler's own vectors, which are
// baseline SSE2 or NEON (in arrays, which were stored by element and loaded whole, AdamW took seven
// times as long: Zen 4, 2026-11-24).
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "qlora_native/types.h"

namespace qlora::cpu {

struct Scalar {
  static constexpr const char* kName = "scalar";
  static constexpr int kWidth = 4;

  using FloatLanes [[gnu::vector_size(16)]] = float;
  using IntLanes [[gnu::vector_size(16)]] = std::int32_t;
  using WordLanes [[gnu::vector_size(16)]] = std::uint32_t;  // for sums and products that wrap
  struct F {
    FloatLanes lane;
  };
  struct I {
    IntLanes lane;
  };

  template <class Op>
  static F map(Op op) {
    F result;
    for (int i = 0; i < kWidth; ++i) result.lane[i] = op(i);
    return result;
  }
  template <class Op>
  static I map_int(Op op) {
    I result;
    for (int i = 0; i < kWidth; ++i) result.lane[i] = op(i);
    return result;
  }

  static F zero() { return set1(0.0f); }
  static F set1(float value) { return {FloatLanes{value, value, value, value}}; }

  // ---- memory: fp32 as it is, fp16 and bf16 widened and rounded to nearest even ----
  static F load(const float* p) {
    F result;
    std::memcpy(&result, p, sizeof result);
    return result;
  }
  static F load(const BFloat16* p) {
    const WordLanes bits = {p[0].bits, p[1].bits, p[2].bits, p[3].bits};
    return {std::bit_cast<FloatLanes>(bits << 16)};
  }
  static F load(const Float16* p) {
    return map([=](int i) { return to_float(p[i]); });
  }
  static void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
  // Past the caches, where p is aligned to the vector; stream_fence() after the last one.
  // (store_decoded<true> likewise.)
  static void stream(float* p, F v) { store(p, v); }
  static void stream_fence() {}
  static void store(BFloat16* p, F v) {
    const WordLanes word = words(bits(v));
    const WordLanes rounded = word + 0x7FFF + ((word >> 16) & 1);
    const WordLanes chosen = v.lane == v.lane ? rounded : word | 0x400000;  // NaN is made quiet
    for (int i = 0; i < kWidth; ++i) p[i].bits = static_cast<std::uint16_t>(chosen[i] >> 16);
  }
  static void store(Float16* p, F v) {
    for (int i = 0; i < kWidth; ++i) p[i] = from_float<Float16>(v.lane[i]);
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
  static F add(F a, F b) { return {a.lane + b.lane}; }
  static F sub(F a, F b) { return {a.lane - b.lane}; }
  static F mul(F a, F b) { return {a.lane * b.lane}; }
  static F div(F a, F b) { return {a.lane / b.lane}; }
  static F sqrt(F a) {
    return map([=](int i) { return std::sqrt(a.lane[i]); });
  }
  static F abs(F a) { return floats(bit_and(bits(a), set1_int(0x7FFFFFFF))); }
  // a * b + c; fused where the processor has it, two roundings here.
  static F fma(F a, F b, F c) { return {a.lane * b.lane + c.lane}; }
  // The larger; b where either is NaN, as x86's max instructions give it.
  static F max(F a, F b) { return {a.lane > b.lane ? a.lane : b.lane}; }
  static F min(F a, F b) { return {a.lane < b.lane ? a.lane : b.lane}; }
  // The larger of `magnitude` (not negative) and |x|, and NaN where either is: compared as
  // integers, in which order every NaN stands above infinity.
  static F max_magnitude(F magnitude, F x) { return floats(max(bits(magnitude), bits(abs(x)))); }
  // 1, -1 or 0, which NaN gets too.
  static F sign(F x) {
    return map([=](int i) {
      return static_cast<float>(x.lane[i] > 0.0f) - static_cast<float>(x.lane[i] < 0.0f);
    });
  }
  // a where `test` is a number, b where it is NaN or infinite.
  static F where_finite(F test, F a, F b) {
    return map([=](int i) { return std::isfinite(test.lane[i]) ? a.lane[i] : b.lane[i]; });
  }

  // ---- across lanes, in a fixed order ----
  static float reduce_add(F v) { return (v.lane[0] + v.lane[2]) + (v.lane[1] + v.lane[3]); }
  static float reduce_max(F v) {
    const float low = v.lane[0] > v.lane[2] ? v.lane[0] : v.lane[2];
    const float high = v.lane[1] > v.lane[3] ? v.lane[1] : v.lane[3];
    return low > high ? low : high;
  }
  // Of lanes that are not negative: the largest, NaN if any is.
  static float reduce_max_magnitude(F v) {
    return larger_magnitude(larger_magnitude(v.lane[0], v.lane[2]),
                            larger_magnitude(v.lane[1], v.lane[3]));
  }

  // ---- 16-bit elements, by their bits: their order without the sign is that of the integers ----
  static constexpr int kHalves = 2 * kWidth;
  using HalfLanes [[gnu::vector_size(16)]] = std::int16_t;
  struct H {
    HalfLanes lane;
  };
  static H zero_halves() { return {HalfLanes{}}; }
  static float widen(Float16 value) { return to_float(value); }
  static float widen(BFloat16 value) { return to_float(value); }
  // The larger of `magnitude` (not negative) and |p[i]|, NaN above infinity.
  template <class T>
  static H max_magnitude_halves(H magnitude, const T* p) {
    HalfLanes bits;
    std::memcpy(&bits, p, sizeof bits);
    bits &= 0x7FFF;
    return {bits > magnitude.lane ? bits : magnitude.lane};
  }
  static std::uint16_t reduce_max_halves(H v) {
    std::int16_t largest = 0;
    for (int i = 0; i < kHalves; ++i) largest = v.lane[i] > largest ? v.lane[i] : largest;
    return static_cast<std::uint16_t>(largest);
  }

  // ---- 32-bit integers ----
  static I set1_int(std::int32_t value) { return {IntLanes{value, value, value, value}}; }
  static I bits(F v) { return {std::bit_cast<IntLanes>(v.lane)}; }
  static F floats(I v) { return {std::bit_cast<FloatLanes>(v.lane)}; }
  static I add(I a, I b) { return wrapped(words(a) + words(b)); }
  static I sub(I a, I b) { return wrapped(words(a) - words(b)); }
  static I bit_and(I a, I b) { return {a.lane & b.lane}; }
  static I max(I a, I b) { return {a.lane > b.lane ? a.lane : b.lane}; }
  // Copies of the sign come in from the left.
  template <int kBits>
  static I shift_right(I a) {
    return {a.lane >> kBits};
  }
  static F to_floats(I a) { return {__builtin_convertvector(a.lane, FloatLanes)}; }
  // Toward zero; what lies outside an int32 is unspecified.
  static I truncate(F v) { return {__builtin_convertvector(v.lane, IntLanes)}; }
  // count + 1 where x is above the threshold or NaN. (A comparison that holds gives -1.)
  static I count_above(I count, F x, F threshold) {
    return {count.lane + 1 + (x.lane <= threshold.lane)};
  }

  // ---- bytes: one to a lane ----
  static I load_bytes(const std::uint8_t* p) {
    return map_int([=](int i) { return static_cast<std::int32_t>(p[i]); });
  }
  static void store_bytes(std::uint8_t* p, I v) {
    for (int i = 0; i < kWidth; ++i) p[i] = static_cast<std::uint8_t>(v.lane[i]);
  }

  // ---- 4-bit codes: two to a byte, the first in the high nibble ----
  // kWidth codes from kWidth / 2 bytes. A code is the low four bits of its lane; what the other
  // bits hold is unspecified.
  static I unpack_codes(const std::uint8_t* packed) {
    return map_int([=](int i) { return packed[i / 2] >> (i % 2 == 0 ? 4 : 0); });
  }
  // The other way, 32 codes at a time; here a lane holds its code and nothing else.
  static void pack_codes(std::uint8_t* packed, const I (&codes)[32 / kWidth]) {
    for (int i = 0; i < 32 / kWidth; ++i) {
      const IntLanes lane = codes[i].lane;
      packed[2 * i] = static_cast<std::uint8_t>((lane[0] << 4) | lane[1]);
      packed[2 * i + 1] = static_cast<std::uint8_t>((lane[2] << 4) | lane[3]);
    }
  }
  // Whether there are load_pairs(p, first, second), which widens 2 kWidth bf16, every other one to
  // `first`, and store_pairs(packed, first, second), which packs their codes.
  static constexpr bool kHasPairs = false;

  // Sixteen floats held in registers, looked up by the low four bits of each lane.
  struct Table {
    float entry[16];
  };
  static Table table(const float* entries) {
    Table result;
    for (int i = 0; i < 16; ++i) result.entry[i] = entries[i];
    return result;
  }
  static Table scaled(const Table& t, float scale) {
    Table result;
    for (int i = 0; i < 16; ++i) result.entry[i] = t.entry[i] * scale;
    return result;
  }
  static F lookup(const Table& t, I codes) {
    return map([&](int i) { return t.entry[codes.lane[i] & 0xF]; });
  }
  // By the four bits of each lane from bit kShift on.
  template <int kShift>
  static F lookup_at(const Table& t, I words) {
    return lookup(t, shift_right<kShift>(words));
  }

  // Sixteen values of a 16-bit type, to decode straight to it, kDecoded of them (32 or 64) at a
  // time.
  static constexpr int kDecoded = 32;
  struct HalfTable {
    std::uint16_t entry[16];
  };
  template <class T>
  static HalfTable half_table(const Table& t) {
    HalfTable result;
    for (int i = 0; i < 16; ++i) result.entry[i] = from_float<T>(t.entry[i]).bits;
    return result;
  }
  template <bool kStream, class T>
  static void store_decoded(T* out, const HalfTable& t, const std::uint8_t* packed) {
    for (int i = 0; i < 16; ++i) {
      out[2 * i].bits = t.entry[packed[i] >> 4];
      out[2 * i + 1].bits = t.entry[packed[i] & 0xF];
    }
  }

  // Fifteen ascending bounds; how many of them are below x (all of them, where x is NaN).
  struct Midpoints {
    F bound[15];
  };
  static Midpoints midpoints(const float* bounds) {
    Midpoints result;
    for (int i = 0; i < 15; ++i) result.bound[i] = set1(bounds[i]);
    return result;
  }
  static I count_below(const Midpoints& m, F x) {
    I count = set1_int(15);
    for (const F bound : m.bound) count.lane += x.lane <= bound.lane;  // -1 where it holds
    return count;
  }

  // Whether there is count_below_binned(bins(bounds), x): the same count for |x| <= 1 (and a few
  // ulp more), where the midpoints lie in as many of 31 equal bins over [-1, 1], none within 1e-5
  // of a bin's edge. What NaN gives is unspecified.
  static constexpr bool kHasBins = false;
  struct Bins {};
  static Bins bins(const float*) { return {}; }

  // Sixteen bytes, looked up by lanes that hold 0..15.
  struct Bytes {
    std::uint8_t entry[16];
  };
  static Bytes bytes(const std::uint8_t* entries) {
    Bytes result;
    for (int i = 0; i < 16; ++i) result.entry[i] = entries[i];
    return result;
  }
  static I lookup_bytes(const Bytes& b, I index) {
    return map_int([&](int i) { return static_cast<std::int32_t>(b.entry[index.lane[i]]); });
  }

  // ---- a 16-bit type's values against bounds of the same type ----
  // Whether there are: load_ordered(p), kHalves values as integers that ascend as they do;
  // store_half_bounds<T>(bounds, half_midpoints(midpoints), divisor, factor), of each midpoint the
  // largest T that times `factor` (1 / divisor) does not exceed it, in an order of V's own;
  // count_above_bounds(load_half_bounds(bounds), x), how many of the fifteen x is above; and
  // pack_counts, order[count] to 16 bytes as pack_codes does it.
  static constexpr bool kHasHalfBounds = false;
  struct HalfMidpoints {};
  static HalfMidpoints half_midpoints(const float*) { return {}; }
  // Whether 16-bit lanes are looked up in registers: codes_8bit_halves_inl.h has the words it
  // needs. first and second are 2 kWidth floats; their upper_halves and lower_halves hold a lane
  // each, and store_joined makes floats of them again; lanes are unsigned but for add_with_sign_of,
  // which gives base + magnitude, base - magnitude where `sign` is negative, and 0 where that is
  // below 0; count_if_above(count, upper, lower, …) adds 1 where upper:lower >
  // bound_upper:bound_lower.
  static constexpr bool kHasHalfTables = false;

  // ---- the matrix products' words ----
  static constexpr bool kHasBf16Pairs = false;  // has pack_pairs and dot_pairs

  // The cache line at p will be read soon; p may lie past the end of what is there. Always inlined
  // on the vector paths: GCC 12 drops calls of a function that only prefetches.
  static void prefetch(const void*) {}      // into the first-level cache
  static void prefetch_far(const void*) {}  // into the second
  static I load_int(const void* p) {
    I result;
    std::memcpy(&result, p, sizeof result);
    return result;
  }
  static void store_int(void* p, I v) { std::memcpy(p, &v, sizeof v); }
  // The first n lanes; the others are 0 and their bytes are not read.
  static I load_int_n(const void* p, std::int64_t n) {
    I result = set1_int(0);
    std::memcpy(&result, p, static_cast<std::size_t>(n) * sizeof(std::int32_t));
    return result;
  }
  // row[i].lane[j] <-> row[j].lane[i]
  static void transpose(I (&row)[kWidth]) {
    for (int i = 0; i < kWidth; ++i) {
      for (int j = 0; j < i; ++j) {
        const std::int32_t swapped = row[i].lane[j];
        row[i].lane[j] = row[j].lane[i];
        row[j].lane[i] = swapped;
      }
    }
  }
  // Lane i is p[index.lane[i]], 0 <= index < kWidth; all kWidth floats are read.
  static F pick(const float* p, I index) {
    return map([=](int i) { return p[index.lane[i]]; });
  }

  // ---- the few-rows linear layer's words, which a path may have (gemv_words_inl.h) ----
  //
  //   BytePlanes byte_planes(entries)      the four bytes of 16 floats apart
  //   I first_codes(words), second_codes   the high or the low nibble of each byte, in that byte
  //   lookup_planes(planes, codes, F[4])   their values: values[j] is of bytes 4 j.. of each half
  //   of
  //                                        the register (of 16 bytes each)
  //   PairTable pair_table(table, s0, s1)  the entries times s0 and times s1, rounded to bf16
  //   I lookup_pairs(pair_table, codes)    both halves of a lane by their lowest nibbles: in the
  //                                        lower lanes scaled with s0, in the upper ones with s1

  // ---- dropout's words: lanes are uint32 ----
  static I lane_index() {
    return map_int([](int i) { return i; });
  }
  static I bit_xor(I a, I b) { return {a.lane ^ b.lane}; }
  static I mul(I a, I b) { return wrapped(words(a) * words(b)); }
  template <int kBits>
  static I shift_right_zeros(I a) {
    return wrapped(words(a) >> kBits);
  }
  // v where a > b as signed integers, else 0.
  static F keep_if_greater(F v, I a, I b) { return floats({bits(v).lane & (a.lane > b.lane)}); }

 private:
  static WordLanes words(I v) { return std::bit_cast<WordLanes>(v.lane); }
  static I wrapped(WordLanes v) { return {std::bit_cast<IntLanes>(v)}; }
  static float larger_magnitude(float a, float b) {
    const std::int32_t x = std::bit_cast<std::int32_t>(a) & 0x7FFFFFFF;
    const std::int32_t y = std::bit_cast<std::int32_t>(b) & 0x7FFFFFFF;
    return std::bit_cast<float>(x > y ? x : y);
  }
};

}  // namespace qlora::cpu
