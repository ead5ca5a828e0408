// Panels of a 4-bit weight whose rows are whole vectors of codes: K a multiple of 16.
//
// Both directions read the checkpoint's layout in place. Scales change only at multiples of
// scale_run(weight) within a row, a power of two of at least 16, whatever K and the block size are.
//
// Forward (P = W^T): the panel's lanes are rows of W. Codes and not floats are transposed: a 32-bit
// word is 8 codes of one row, so kWidth words from each of kWidth rows take log2(kWidth) shuffles a
// word, that is kWidth * 8 vectors of values for 4 * kWidth shuffles (AVX-512). Word j of all rows
// then gives 8 depths by a shift, a look-up and a multiplication with the vector of the rows'
// scales each. Transposing the floats instead took twice the shuffles that the look-ups take.
//
// Input gradient (P = W): the panel's lanes are neighbours in a row of W: the table is scaled once
// for a run of the block, and each vector is an unpacking, a look-up and a store.
#pragma once

#include <cstdint>

#include "decode_inl.h"
#include "gemm_tile_inl.h"
#include "qlora_native/layout.h"

namespace qlora::cpu {

inline constexpr std::int64_t kCodesPerWord = 8;
inline constexpr std::int64_t kMinScaleRun = 16;
inline constexpr std::int64_t kMaxScaleRun = 128;

template <class Weight>
bool rows_are_whole_vectors(const Weight& weight) {
  return weight.cols % kMinScaleRun == 0;
}

// The length of the aligned runs of a row that have one scale: the power of two that divides both K
// and the block size, at most kMaxScaleRun (which divides every depth that a block starts at).
template <class Weight>
std::int64_t scale_run(const Weight& weight) {
  const std::int64_t both = weight.cols | weight.blocksize | kMaxScaleRun;
  return both & -both;
}

// The 8 depths of one word per row, as fp32 or as 4 pairs of bf16.
template <class V, Product kProduct>
void store_word_columns(typename V::I words, const typename V::Table& table, typename V::F scale,
                        float* to) {
  constexpr std::int64_t kCols = Gemm<V>::kPanelCols;
  const auto value = [&]<int kShift>() {
    return V::mul(V::lookup(table, V::template shift_right<kShift>(words)), scale);
  };
  // The first of a byte's two codes is its high nibble.
  const auto byte = [&]<int kByte>() {
    const auto first = value.template operator()<kByte * 8 + 4>();
    const auto second = value.template operator()<kByte * 8>();
    if constexpr (kProduct == Product::bf16_pairs) {
      V::store_int(to + kByte * kCols, V::pack_pairs(first, second));
    } else {
      V::store(to + (2 * kByte) * kCols, first);
      V::store(to + (2 * kByte + 1) * kCols, second);
    }
  };
  byte.template operator()<0>();
  byte.template operator()<1>();
  byte.template operator()<2>();
  byte.template operator()<3>();
}

// kWidth columns of P^T = rows of W from `row` on, depths depth_begin.. of them, into a panel's
// lanes.
template <class V, Product kProduct>
void pack_weight_lanes(const Weight4bit& weight, std::int64_t row, std::int64_t depth_begin,
                       std::int64_t depth, float* to) {
  constexpr int kWidth = V::kWidth;
  constexpr std::int64_t kDepthPerWord =
      (kProduct == Product::bf16_pairs ? kCodesPerWord / 2 : kCodesPerWord) * Gemm<V>::kPanelCols;
  constexpr std::int64_t kMaxDepth = 2 * Gemm<V>::kSteps;
  const std::int64_t run = scale_run(weight);
  const std::uint8_t* codes[kWidth];
  float scales[kMaxDepth / kMinScaleRun * kWidth];  // [run of depth][row]
  for (int i = 0; i < kWidth; ++i) {
    const std::int64_t safe_row = row + i < weight.rows ? row + i : weight.rows - 1;
    const std::int64_t first = safe_row * weight.cols + depth_begin;
    codes[i] = weight.packed + first / 2;
    for (std::int64_t d = 0; d < depth; d += run) {
      scales[d / run * kWidth + i] = block_scale<V>(weight.scales, (first + d) / weight.blocksize);
    }
  }
  const auto table = V::table(weight.format.values);
  const std::int64_t n_words = depth / kCodesPerWord;
  for (std::int64_t word = 0; word < n_words; word += kWidth) {
    const std::int64_t n = n_words - word < kWidth ? n_words - word : kWidth;
    typename V::I words[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      const std::uint8_t* from = codes[i] + word * 4;
      words[i] = n == kWidth ? V::load_int(from) : V::load_int_n(from, n);
    }
    V::transpose(words);
    for (std::int64_t j = 0; j < n; ++j) {
      const auto scale = V::load(scales + (word + j) * kCodesPerWord / run * kWidth);
      store_word_columns<V, kProduct>(words[j], table, scale, to + (word + j) * kDepthPerWord);
    }
  }
}

template <class V, Product kProduct>
void pack_weight_columns(const Weight4bit& weight, std::int64_t depth_begin, std::int64_t depth,
                         std::int64_t col_begin, std::int64_t cols, float* panels) {
  for (std::int64_t c = 0; c < cols; c += Gemm<V>::kPanelCols, panels += Gemm<V>::kPanelSize) {
    for (int j = 0; j < Gemm<V>::kVecs; ++j) {
      pack_weight_lanes<V, kProduct>(weight, col_begin + c + j * V::kWidth, depth_begin, depth,
                                     panels + j * V::kWidth);
    }
  }
}

// Rows of W are depths of P.
template <class V, Product kProduct>
void pack_weight_rows(const Weight4bit& weight, std::int64_t depth_begin, std::int64_t depth,
                      std::int64_t col_begin, std::int64_t cols, float* panels) {
  constexpr std::int64_t kCols = Gemm<V>::kPanelCols;
  constexpr bool kPairs = kProduct == Product::bf16_pairs;
  constexpr std::int64_t kDepths = kPairs ? 2 : 1;
  const std::int64_t run = scale_run(weight);
  const auto values = V::table(weight.format.values);
  const auto padded_cols = ceil_div(cols, kCols) * kCols;
  for (std::int64_t d = 0; d < depth; d += kDepths) {
    const std::int64_t first = (depth_begin + d) * weight.cols + col_begin;
    // A last, lone depth of a pair is paired with itself at a scale of 0.
    const bool has_second = d + 1 < depth;
    const std::int64_t second = has_second ? first + weight.cols : first;
    float* step = panels + d / kDepths * kCols;
    std::int64_t c = 0;
    while (c < cols) {
      const std::int64_t run_end = ((col_begin + c) / run + 1) * run - col_begin;
      const std::int64_t stop = run_end < cols ? run_end : cols;
      const auto table = block_table<V>(weight, (first + c) / weight.blocksize);
      const auto table_2 = !has_second ? V::scaled(values, 0.0f)
                           : kPairs    ? block_table<V>(weight, (second + c) / weight.blocksize)
                                       : table;
      for (; c < stop; c += V::kWidth) {
        float* to = step + c / kCols * Gemm<V>::kPanelSize + c % kCols;
        const auto value = V::lookup(table, V::unpack_codes(weight.packed + (first + c) / 2));
        if constexpr (kPairs) {
          const auto value_2 =
              V::lookup(table_2, V::unpack_codes(weight.packed + (second + c) / 2));
          V::store_int(to, V::pack_pairs(value, value_2));
        } else {
          V::store(to, value);
        }
      }
    }
    for (; c < padded_cols; c += V::kWidth) {
      V::store(step + c / kCols * Gemm<V>::kPanelSize + c % kCols, V::zero());
    }
  }
}

}  // namespace qlora::cpu
