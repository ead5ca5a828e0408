// The scales of kN rows of a weight at a time, one group of rows after the other.
//
// Reading the dynamic map takes two loads and a store a scale, code by code: for the rows that come
// next it is done a span at a time between the products of the rows that go by, which need other
// units. A row's scales are whole when `of` first returns them.
#pragma once

#include <cstdint>

#include "scales_inl.h"
#include "whole_rows_inl.h"

namespace qlora::cpu {

template <class V, int kN>
class RowScales {
 public:
  // Behind a row's scales follow zeros, for V::pick reads a whole vector.
  static constexpr std::int64_t stride(std::int64_t cols) {
    return cols / WholeRows<V>::kMinRun + 1 + V::kWidth;
  }
  static constexpr std::int64_t floats(std::int64_t cols) { return 2 * kN * stride(cols); }

  // Rows `row`.. come first.
  RowScales(const WholeRows<V>& rows, std::int64_t row, float* scratch)
      : rows_(rows),
        now_(scratch + kN * stride(rows.weight.cols)),
        next_(scratch),
        ahead_(rows.weight.scales.double_quantized() && rows.run_shift == rows.block_shift) {
    read_ahead(row, 0, rows.weight.cols);
  }

  // The map's values of rows `row`.., values first.. first + count - 1 of each; first starts a run.
  [[gnu::always_inline]] void read_ahead(std::int64_t row, std::int64_t first, std::int64_t count) {
    if (!ahead_) return;
    const std::int64_t from = first >> rows_.run_shift, n = count >> rows_.run_shift;
    for (int i = 0; i < kN; ++i) {
      read_map<V>(kDynamicMapSigned, rows_.weight.scales.absmax_q8 + first_block(row + i) + from, n,
                  next_ + i * stride(rows_.weight.cols) + from);
    }
  }

  // On to rows `row`.., which were read ahead.
  void advance(std::int64_t row) {
    float* swapped = now_;
    now_ = next_;
    next_ = swapped;
    const std::int64_t cols = rows_.weight.cols, n = cols >> rows_.run_shift;
    for (int i = 0; i < kN; ++i) {
      float* scales = now_ + i * stride(cols);
      if (ahead_) {
        apply_nested_scales<V>(rows_.weight.scales, first_block(row + i), n, scales);
      } else {
        rows_.scales(row + i, 0, cols, scales);
      }
      V::store(scales + n, V::zero());
    }
  }

  // The scales of the i-th row's runs from value `first` on, and V::kWidth readable floats.
  [[gnu::always_inline]] const float* of(int i, std::int64_t first) const {
    return now_ + i * stride(rows_.weight.cols) + (first >> rows_.run_shift);
  }

 private:
  std::int64_t first_block(std::int64_t row) const {
    return (row * rows_.weight.cols) >> rows_.block_shift;
  }

  const WholeRows<V>& rows_;
  float* now_;
  float* next_;
  const bool ahead_;
};

}  // namespace qlora::cpu
