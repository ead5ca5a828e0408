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

  const Weight4bit& weight;
  typename V::Table table;
  int block_shift;
  int run_shift;
  std::int32_t run_of_word[V::kWidth];  // of a vector of words that starts with a run: which run
};

}  // namespace qlora::cpu
