// A 4-bit weight whose rows are whole vectors of codes (K a multiple of 16), and the scales of its
// rows.
//
// Blocks need not end where rows end, but within a row scales change only at multiples of a run:
// the power of two that divides both K and the block size, 16 at least. Runs are cut at kMaxRun, so
// that every place at which a block of a product starts is the start of a run. Sizes are kept as
// shifts: a 64-bit division costs as much as the look-up of 64 codes.
#pragma once

#include <bit>
#include <cstdint>

#include "decode_inl.h"
#include "qlora_native/params.h"
#include "scales_inl.h"

namespace qlora::cpu {

inline constexpr std::int64_t kCodesPerWord = 8;  // a 32-bit word

template <class V>
struct WholeRows {
  static constexpr std::int64_t kMinRun = 16;
  static constexpr std::int64_t kMaxRun = 128;

  static bool fits(const Weight4bit& weight) { return weight.cols % kMinRun == 0; }

  explicit WholeRows(const Weight4bit& weight)
      : weight(weight),
        table(V::table(weight.format.values)),
        block_shift(std::countr_zero(static_cast<std::uint64_t>(weight.blocksize))),
        run_shift(std::countr_zero(
            static_cast<std::uint64_t>(weight.cols | weight.blocksize | kMaxRun))) {
    for (int i = 0; i < V::kWidth; ++i) {
      run_of_word[i] = static_cast<std::int32_t>(i * kCodesPerWord >> run_shift);
    }
  }

  // The first byte of values `col`.. of row `row`.
  const std::uint8_t* codes(std::int64_t row, std::int64_t col) const {
    return weight.packed + (row * weight.cols + col) / 2;
  }

  // out[i] = the scale of the i-th run from `col` on, for `count` values; col is the start of a
  // run.
  void scales(std::int64_t row, std::int64_t col, std::int64_t count, float* out) const {
    const std::int64_t first = row * weight.cols + col;
    const std::int64_t n_runs = (count + (std::int64_t{1} << run_shift) - 1) >> run_shift;
    if (run_shift == block_shift) {
      return block_scales<V>(weight.scales, first >> block_shift, n_runs, out);
    }
    for (std::int64_t i = 0; i < n_runs; ++i) {
      out[i] = block_scale<V>(weight.scales, (first + (i << run_shift)) >> block_shift);
    }
  }

  // out[j][i] = the scale of row rows[i]'s j-th run from `col` on: the lanes of a panel.
  void lane_scales(const std::int64_t (&lane_rows)[V::kWidth], std::int64_t col,
                   std::int64_t n_runs, float (*out)[V::kWidth]) const {
    if (!weight.scales.double_quantized() || run_shift != block_shift) {
      return any_lane_scales(lane_rows, col, n_runs, out);
    }
    std::int64_t blocks[V::kWidth];
    float nested_absmax[V::kWidth];
    for (int i = 0; i < V::kWidth; ++i) {
      blocks[i] = (lane_rows[i] * weight.cols + col) >> block_shift;
      nested_absmax[i] = weight.scales.nested_absmax[blocks[i] / kNestedBlocksize];
      // Rows whose runs are of two nested blocks are few: all are done one by one then.
      if (blocks[i] % kNestedBlocksize + n_runs > kNestedBlocksize) {
        return any_lane_scales(lane_rows, col, n_runs, out);
      }
    }
    read_lane_map<V>(weight.scales.absmax_q8, blocks, n_runs, out);
    const auto factor = V::load(nested_absmax), offset = V::set1(*weight.scales.nested_offset);
    for (std::int64_t j = 0; j < n_runs; ++j) {
      V::store(out[j], V::add(V::mul(V::load(out[j]), factor), offset));
    }
  }

  const Weight4bit& weight;
  typename V::Table table;
  int block_shift;
  int run_shift;
  std::int32_t run_of_word[V::kWidth];  // of a vector of words that starts with a run: which run

 private:
  void any_lane_scales(const std::int64_t (&lane_rows)[V::kWidth], std::int64_t col,
                       std::int64_t n_runs, float (*out)[V::kWidth]) const {
    for (int i = 0; i < V::kWidth; ++i) {
      const std::int64_t first = lane_rows[i] * weight.cols + col;
      for (std::int64_t j = 0; j < n_runs; ++j) {
        out[j][i] = block_scale<V>(weight.scales, (first + (j << run_shift)) >> block_shift);
      }
    }
  }
};

}  // namespace qlora::cpu
