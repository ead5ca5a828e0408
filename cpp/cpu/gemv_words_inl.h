// The inner product of the few-rows linear layer: vectors of 32-bit words, 8 codes to a word, of
// kN rows of W against kM rows of x.
//
// How words become values differs, and with it where x must lie; a decoder tells both:
//
//   ShiftWords   a step shifts code j of every word to the bottom and looks it up: a shift, a
//                look-up and the multiply-adds for kWidth values.
//   PlaneWords   (AVX2) a table of 16 floats does not fit a register there. The four bytes of the
//                entries are looked up apart, 32 at a time, and interleaved: 14 instructions for 32
//                values, where shifts, two permutations and a blend take 20.
//   PairWords    (AVX512-BF16, bf16 activations) two codes of a word are looked up at once as a
//                pair of bf16 and meet a pair of x in one vdpbf16ps: half the instructions. The
//                table holds the values of two blocks, scaled and then rounded as a dequantized
//                bf16 weight is, and is made anew for each vector of words (three instructions).
//
// With few rows of x the products of a vector of words are summed before they meet the scale, which
// is one for at least two words.
//
// On Zen 4 a lone row is limited by how evenly the four vector units are fed (AVX2: 39 instructions
// for 64 values take 14 cycles; AVX-512: 27, each twice, for 128 values take 15), more rows by the
// multiply-add units. Loading the words at offsets of 1, 2 and 3 bytes in place of shifts lost:
// such a load crosses a cache line every time.
#pragma once

#include <bit>
#include <cstdint>

#include "qlora_native/types.h"
#include "whole_rows_inl.h"

namespace qlora::cpu {

template <class V>
inline constexpr std::int64_t kCodesOfWords = kCodesPerWord * V::kWidth;  // in a vector of words

template <class V>
concept HasBytePlanes = requires { typename V::BytePlanes; };

template <class V>
concept HasPairTables = requires { typename V::PairTable; };

// What the two decoders to fp32 share.
template <class V>
struct FloatWords {
  using Vector = V;
  using Operand = typename V::F;
  using Scale = typename V::F;
  static constexpr bool kScalesTable = false;
  static constexpr int kSteps = 8;

  // Of a vector of words, from the scales of its runs; the whole of V::kWidth floats is read.
  Scale scale(const float* of_runs, int /*run_shift*/, typename V::I run_of_word) const {
    return V::pick(of_runs, run_of_word);
  }

  static Operand load_x(const float* x) { return V::load(x); }
  static typename V::F multiply_add(Operand w, Operand x, typename V::F sum) {
    return V::fma(w, x, sum);
  }
};

template <class V>
struct ShiftWords : FloatWords<V> {
  static constexpr int kMinRunShift = 4;
  static constexpr int kTogether = 1;  // steps that are decoded at once

  explicit ShiftWords(const float* values) : table(V::table(values)) {}

  template <int kStep>
  [[gnu::always_inline]] void decode(typename V::I words, typename V::F /*scale*/,
                                     typename V::F (&w)[kTogether]) const {
    // The first of a byte's two codes is its high nibble.
    w[0] = V::template lookup_at<kStep / 2 * 8 + (kStep % 2 == 0 ? 4 : 0)>(table, words);
  }

  // x of a vector of words' codes, in the order in which the steps' lanes meet it.
  static void place_x(const float (&x)[kCodesOfWords<V>], float* to) {
    for (int step = 0; step < 8; ++step) {
      for (int lane = 0; lane < V::kWidth; ++lane) {
        to[step * V::kWidth + lane] = x[lane * kCodesPerWord + step];
      }
    }
  }

  typename V::Table table;
};

template <class V>
struct PlaneWords : FloatWords<V> {
  static constexpr int kMinRunShift = 5;  // a half of a register has one scale
  static constexpr int kTogether = 4;

  explicit PlaneWords(const float* values) : planes(V::byte_planes(values)) {}

  template <int kStep>
  [[gnu::always_inline]] void decode(typename V::I words, typename V::F /*scale*/,
                                     typename V::F (&w)[kTogether]) const {
    V::lookup_planes(planes, kStep == 0 ? V::first_codes(words) : V::second_codes(words), w);
  }

  // A byte's first codes go to steps 0..3, its second ones to 4..7, four bytes of each half of the
  // register to a step.
  static void place_x(const float (&x)[kCodesOfWords<V>], float* to) {
    constexpr int kHalf = V::kWidth / 2;
    for (int step = 0; step < 8; ++step) {
      for (int lane = 0; lane < V::kWidth; ++lane) {
        const int byte = lane / kHalf * 4 * kHalf + step % 4 * kHalf + lane % kHalf;
        to[step * V::kWidth + lane] = x[2 * byte + step / 4];
      }
    }
  }

  typename V::BytePlanes planes;
};

template <class V>
struct PairWords {
  using Vector = V;
  using Operand = typename V::I;
  using Scale = typename V::PairTable;
  static constexpr bool kScalesTable = true;
  static constexpr int kMinRunShift = 6;  // a half of a vector of words has one scale
  static constexpr int kSteps = 4;
  static constexpr int kTogether = 1;

  explicit PairWords(const float* values) : table(V::table(values)) {}

  Scale scale(const float* of_runs, int run_shift, typename V::I /*run_of_word*/) const {
    return V::pair_table(table, of_runs[0], of_runs[kCodesOfWords<V> / 2 >> run_shift]);
  }

  // Codes kStep and kStep + 4 of every word.
  template <int kStep>
  [[gnu::always_inline]] void decode(typename V::I words, const Scale& scale,
                                     typename V::I (&w)[kTogether]) const {
    w[0] = V::lookup_pairs(
        scale, V::template shift_right<kStep / 2 * 8 + (kStep % 2 == 0 ? 4 : 0)>(words));
  }

  // x is of bf16 values.
  static void place_x(const float (&x)[kCodesOfWords<V>], float* to) {
    const auto upper = [](float v) { return std::bit_cast<std::uint32_t>(v) >> 16; };
    for (int step = 0; step < kSteps; ++step) {
      for (int lane = 0; lane < V::kWidth; ++lane) {
        const float* word = x + lane * kCodesPerWord + step;
        to[step * V::kWidth + lane] = std::bit_cast<float>(upper(word[0]) | upper(word[4]) << 16);
      }
    }
  }

  static Operand load_x(const float* x) { return V::load_int(x); }
  static typename V::F multiply_add(Operand w, Operand x, typename V::F sum) {
    return V::dot_pairs(sum, w, x);
  }

  typename V::Table table;
};

// How kN rows of W meet kM rows of x. As many rows of W go by together as the registers hold, for
// each x that is loaded serves them all. Measured on Zen 4 (2026-11-24, one thread, in cache).
template <class Decoder, int kM>
struct GemvShape {
  static constexpr int kWidth = Decoder::Vector::kWidth;

  static constexpr int rows_of_w() {
    if (kWidth == 16 && Decoder::kScalesTable) return kM <= 2 ? 4 : 2;
    if (kWidth == 16) return kM == 1 ? 1 : kM == 4 ? 3 : kM <= 6 ? 4 : 2;
    return kWidth == 8 && kM > 1 ? 2 : 1;
  }
  static constexpr int kN = rows_of_w();
  // A lone row of x too long for L1 beside the codes comes from L2 for each row of W anew, which
  // then two share: K = 8192 takes 10 % less, 14336 30 %, but 4096 10 % more.
  static constexpr int kLongN = kWidth == 16 && kM == 1 && kN == 1 ? 2 : kN;
  static constexpr std::int64_t kLong = 6144;  // values: 24 of the 32 KiB that L1 has at least
  // Many rows of x: a multiplication of each value with its scale is less work than one of each
  // sum, and half as many sums stay in registers.
  static constexpr bool kScaleValues = !Decoder::kScalesTable && kM > 4;
  static constexpr bool kScaleSums = !Decoder::kScalesTable && !kScaleValues;
  // One sum is a chain of additions too long for the units to stay busy: two chains then.
  static constexpr int kChains = kM == 1 && kScaleSums ? 2 : 1;
};

// sum[i][m] += words[i] . x[m]. x holds kM vectors of words' x, as place_x leaves them.
template <class Decoder, int kM, int kN>
[[gnu::always_inline]] inline void dot_words(const Decoder& decoder,
                                             const typename Decoder::Vector::I (&words)[kN],
                                             const float* x,
                                             const typename Decoder::Scale (&scale)[kN],
                                             typename Decoder::Vector::F (&sum)[kN][kM]) {
  using V = typename Decoder::Vector;
  using Shape = GemvShape<Decoder, kM>;
  constexpr int kTogether = Decoder::kTogether;
  typename V::F part[kN][kM][Shape::kChains];
  const auto steps = [&]<int kGroup>() __attribute__((always_inline)) {
    typename Decoder::Operand w[kN][kTogether];
#pragma GCC unroll 8
    for (int i = 0; i < kN; ++i) decoder.template decode<kGroup>(words[i], scale[i], w[i]);
#pragma GCC unroll 8
    for (int t = 0; t < kTogether; ++t) {
      const int step = kGroup * kTogether + t;
      if constexpr (Shape::kScaleValues) {
#pragma GCC unroll 8
        for (int i = 0; i < kN; ++i) w[i][t] = V::mul(w[i][t], scale[i]);
      }
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) {
        const auto right = Decoder::load_x(x + (m * Decoder::kSteps + step) * V::kWidth);
#pragma GCC unroll 8
        for (int i = 0; i < kN; ++i) {
          if constexpr (Shape::kScaleSums) {
            auto& to = part[i][m][step % Shape::kChains];
            to = step < Shape::kChains ? V::mul(w[i][t], right) : V::fma(w[i][t], right, to);
          } else {
            sum[i][m] = Decoder::multiply_add(w[i][t], right, sum[i][m]);
          }
        }
      }
    }
  };
  constexpr int kGroups = Decoder::kSteps / kTogether;
  static_assert(kGroups == 2 || kGroups == 4 || kGroups == 8);
  steps.template operator()<0>();
  steps.template operator()<1>();
  if constexpr (kGroups > 2) {
    steps.template operator()<2>();
    steps.template operator()<3>();
  }
  if constexpr (kGroups > 4) {
    steps.template operator()<4>();
    steps.template operator()<5>();
    steps.template operator()<6>();
    steps.template operator()<7>();
  }
  if constexpr (Shape::kScaleSums) {
#pragma GCC unroll 8
    for (int i = 0; i < kN; ++i) {
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) {
        auto products = part[i][m][0];
        if constexpr (Shape::kChains == 2) products = V::add(products, part[i][m][1]);
        sum[i][m] = V::fma(products, scale[i], sum[i][m]);
      }
    }
  }
}

}  // namespace qlora::cpu
