// Panels of a 4-bit weight whose rows are whole vectors of codes (whole_rows_inl.h), read in place.
//
// Forward (P = W^T): the panel's lanes are rows of W. Codes and not floats are transposed: a 32-bit
// word is 8 codes of one row, so kWidth words from each of kWidth rows take log2(kWidth) shuffles a
// word, that is kWidth * 8 vectors of values for 4 * kWidth shuffles (AVX-512). Word j of all rows
// then gives 8 depths by a shift, a look-up and a multiplication with the vector of the rows'
// scales each. Transposing the floats instead takes twice the shuffles that the look-ups take.
//
// Input gradient (P = W): the panel's lanes are neighbours in a row of W: the table is scaled once
// for a run of the block, and each vector is an unpacking, a look-up and a store.
#pragma once

#include <cstdint>

#include "gemm_tile_inl.h"
#include "qlora_native/layout.h"
#include "whole_rows_inl.h"

namespace qlora::cpu {

// The part of P that one packing takes.
struct PanelBlock {
  std::int64_t depth_begin;
  std::int64_t depth;
  std::int64_t col_begin;
  std::int64_t cols;
};

// The 8 depths of one word per row, as fp32 or as 4 pairs of bf16.
template <class V, Product kProduct>
void store_word_columns(typename V::I words, const typename V::Table& table, typename V::F scale,
                        float* to) {
  constexpr std::int64_t kCols = Gemm<V>::kPanelCols;
  const auto value = [&]<int kShift>() {
    return V::mul(V::template lookup_at<kShift>(table, words), scale);
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

// Rows row.. of W, kWidth of them, depths depth_begin.. of each, into the lanes of a panel.
template <class V, Product kProduct>
void pack_weight_lanes(const WholeRows<V>& rows, std::int64_t row, std::int64_t depth_begin,
                       std::int64_t depth, float* to) {
  constexpr int kWidth = V::kWidth;
  constexpr std::int64_t kStepsPerWord =
      kProduct == Product::bf16_pairs ? kCodesPerWord / 2 : kCodesPerWord;
  constexpr std::int64_t kMaxRuns = 2 * Gemm<V>::kSteps / WholeRows<V>::kMinRun;
  std::int64_t lane_rows[kWidth];
  const std::uint8_t* codes[kWidth];
  for (int i = 0; i < kWidth; ++i) {
    // Lanes past the last row repeat it; their columns of C are never written out.
    lane_rows[i] = least(row + i, rows.weight.rows - 1);
    codes[i] = rows.codes(lane_rows[i], depth_begin);
    // The rows that come next: a row's part is too short for the hardware to see where it leads.
    const std::uint8_t* next = rows.codes(row + kWidth + i, depth_begin);
    for (std::int64_t at = 0; at < depth / 2; at += kCacheLine) V::prefetch(next + at);
  }
  float scales[kMaxRuns][kWidth];
  rows.lane_scales(lane_rows, depth_begin, ceil_div(depth, std::int64_t{1} << rows.run_shift),
                   scales);
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
      const auto scale = V::load(scales[(word + j) * kCodesPerWord >> rows.run_shift]);
      store_word_columns<V, kProduct>(words[j], rows.table, scale,
                                      to + (word + j) * kStepsPerWord * Gemm<V>::kPanelCols);
    }
  }
}

template <class V, Product kProduct>
void pack_weight_columns(const Weight4bit& weight, const PanelBlock& block, float* panels) {
  const WholeRows<V> rows(weight);
  for (std::int64_t c = 0; c < block.cols; c += Gemm<V>::kPanelCols) {
    for (int j = 0; j < Gemm<V>::kVecs && c + j * V::kWidth < block.cols; ++j) {
      pack_weight_lanes<V, kProduct>(rows, block.col_begin + c + j * V::kWidth, block.depth_begin,
                                     block.depth, panels + j * V::kWidth);
    }
    panels += Gemm<V>::kPanelSize;
  }
}

// Rows of W are depths of P; a pair is two neighbouring rows.
template <class V, Product kProduct>
void pack_weight_rows(const Weight4bit& weight, const PanelBlock& block, float* panels) {
  constexpr std::int64_t kCols = Gemm<V>::kPanelCols;
  constexpr int kDepths = kProduct == Product::bf16_pairs ? 2 : 1;
  constexpr std::int64_t kMaxRuns = Gemm<V>::kCols / WholeRows<V>::kMinRun + 1;
  const WholeRows<V> rows(weight);
  const std::int64_t first_run = block.col_begin >> rows.run_shift;
  const std::int64_t runs_begin = (first_run << rows.run_shift) - block.col_begin;  // 0 or less
  const auto place = [&](std::int64_t d, std::int64_t c) {
    return panels + c / kCols * Gemm<V>::kPanelSize + d / kDepths * kCols + c % kCols;
  };
  for (std::int64_t d = 0; d < block.depth; d += kDepths) {
    float scales[kDepths][kMaxRuns + V::kWidth] = {};
    const std::uint8_t* codes[kDepths];
    for (int i = 0; i < kDepths; ++i) {
      // A last, lone depth is paired with itself at a scale of 0.
      const bool there = d + i < block.depth;
      const std::int64_t row = block.depth_begin + d + (there ? i : 0);
      codes[i] = rows.codes(row, block.col_begin);
      if (there) {
        rows.scales(row, first_run << rows.run_shift, block.cols - runs_begin, scales[i]);
      }
    }
    std::int64_t c = 0;
    for (std::int64_t run = 0; c < block.cols; ++run) {
      const std::int64_t run_end = runs_begin + ((run + 1) << rows.run_shift);
      const std::int64_t stop = run_end < block.cols ? run_end : block.cols;
      const auto table = V::scaled(rows.table, scales[0][run]);
      if constexpr (kProduct == Product::bf16_pairs) {
        const auto table_2 = V::scaled(rows.table, scales[1][run]);
        for (; c < stop; c += V::kWidth) {
          V::store_int(place(d, c),
                       V::pack_pairs(V::lookup(table, V::unpack_codes(codes[0] + c / 2)),
                                     V::lookup(table_2, V::unpack_codes(codes[1] + c / 2))));
        }
      } else {
        for (; c < stop; c += V::kWidth) {
          V::store(place(d, c), V::lookup(table, V::unpack_codes(codes[0] + c / 2)));
        }
      }
    }
  }
}

}  // namespace qlora::cpu
