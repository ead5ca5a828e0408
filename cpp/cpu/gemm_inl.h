// The packed matrix product that every linear op of more than a few rows is made of:
//
//   out[M, N] = bias + sum over segments of A_s[M, D_s] * P_s[D_s, N]
//
// A segment has its own operand, its own source and its own depth, so that a LoRA product is a few
// more depth steps into the same tile of C, and a 4-bit weight is one more way to fill a panel.
//
//   for each part of C (one thread each):                   rows and columns, by the thread count
//     for kRowChunk rows, for kCols columns:                C block, fp32, in cache
//       for each segment, for kSteps of its depth:          the only loop whose order adds up
//         pack the source into panels                       the 4-bit weight is dequantized here
//         for kRows rows: pack the operand                  into L1
//           for each panel: gemm_tile
//       write the C block: + bias, to out's dtype
//
// Parts are split without touching the depth, so bits do not depend on the thread count.
#pragma once

#include <cstdint>

#include "gemm_operand_inl.h"
#include "gemm_panels_inl.h"
#include "parallel.h"
#include "qlora_native/layout.h"
#include "workspace.h"

namespace qlora::cpu {

struct Segment {
  Operand operand;
  Source source;
  std::int64_t depth;
  Product product = Product::fp32;
  Dropout mask_after =
      {};  // zeroes what C holds once this segment is in; the gain is the operand's
};

struct GemmOutput {
  DType dtype;
  void* data;
  std::int64_t row_stride;
  std::int64_t col_stride = 1;
  const void* bias = nullptr;  // [N], of dtype
};

struct Range {
  std::int64_t begin, end;

  // Part `i` of `n`, in whole multiples of `unit` save the last.
  [[gnu::always_inline]] Range part(std::int64_t i, std::int64_t n, std::int64_t unit) const {
    const std::int64_t units = (end - begin + unit - 1) / unit;
    const std::int64_t first = begin + units * i / n * unit,
                       last = begin + units * (i + 1) / n * unit;
    return {first, last < end ? last : end};
  }
};

template <class V>
class GemmRun {
 public:
  static constexpr std::int64_t kMaxRows = Gemm<V>::kRows;
  static constexpr std::int64_t kPanelFloats = Gemm<V>::kPanels * Gemm<V>::kPanelSize;
  static constexpr std::int64_t kOperandFloats = kMaxRows * Gemm<V>::kOperandStride;
  static constexpr std::int64_t kBlockFloats = Gemm<V>::kRowChunk * Gemm<V>::kCols;
  static constexpr std::int64_t kScratchFloats = kPanelFloats + kOperandFloats + kBlockFloats;

  GemmRun(const Segment* segments, int n_segments, const GemmOutput& output, float* scratch)
      : segments_(segments),
        n_segments_(n_segments),
        output_(output),
        panels_(scratch),
        operand_(scratch + kPanelFloats),
        block_(operand_ + kOperandFloats) {}

  void run(Range rows, Range cols) {
    const std::int64_t n_row_chunks = ceil_div(rows.end - rows.begin, Gemm<V>::kRowChunk);
    const std::int64_t n_col_blocks = ceil_div(cols.end - cols.begin, Gemm<V>::kCols);
    for (std::int64_t i = 0; i < n_row_chunks; ++i) {
      for (std::int64_t j = 0; j < n_col_blocks; ++j) {
        run_block(rows.part(i, n_row_chunks, 1), cols.part(j, n_col_blocks, Gemm<V>::kPanelCols));
      }
    }
  }

 private:
  void run_block(Range rows, Range cols) {
    bool started = false;
    for (int s = 0; s < n_segments_; ++s) {
      const Segment& segment = segments_[s];
      if constexpr (V::kHasBf16Pairs) {
        if (segment.product == Product::bf16_pairs) {
          started |= add_segment<Product::bf16_pairs>(segment, rows, cols, started);
          continue;
        }
      }
      started |= add_segment<Product::fp32>(segment, rows, cols, started);
      if (segment.mask_after.active && started) mask_block(segment.mask_after, rows, cols);
    }
    with_type(output_.dtype, [&]<class T>() { write_block<T>(rows, cols, started); });
  }

  // False where the segment's depth is 0: the block then holds nothing new.
  template <Product kProduct>
  bool add_segment(const Segment& segment, Range rows, Range cols, bool started) {
    constexpr std::int64_t kDepth = Gemm<V>::kSteps * (kProduct == Product::bf16_pairs ? 2 : 1);
    for (std::int64_t d = 0; d < segment.depth; d += kDepth) {
      const std::int64_t depth = segment.depth - d < kDepth ? segment.depth - d : kDepth;
      pack_panels<V, kProduct>(segment.source, {d, depth, cols.begin, cols.end - cols.begin},
                               panels_);
      multiply<kProduct>(segment.operand, d, depth, rows, cols.end - cols.begin, started || d > 0);
    }
    return segment.depth > 0;
  }

  template <Product kProduct>
  void multiply(const Operand& operand, std::int64_t depth_begin, std::int64_t depth, Range rows,
                std::int64_t n_cols, bool accumulate) {
    constexpr bool kPairs = kProduct == Product::bf16_pairs;
    const std::int64_t steps = kPairs ? ceil_div(depth, 2) : depth;
    // Tiles of equal height: 16 rows are 8 + 8 and not 14 + 2.
    const std::int64_t n_rows = rows.end - rows.begin;
    const std::int64_t tile_rows = ceil_div(n_rows, ceil_div(n_rows, kMaxRows));
    for (std::int64_t i = 0; i < n_rows; i += tile_rows) {
      const std::int64_t height = least(tile_rows, n_rows - i);
      if constexpr (kPairs) {
        pack_operand_pairs<V>(operand, rows.begin + i, height, depth_begin, depth, operand_);
      } else {
        pack_operand<V>(operand, rows.begin + i, height, depth_begin, depth, operand_);
      }
      const std::int64_t next = i + height, next_height = least(tile_rows, n_rows - next);
      const std::int64_t n_panels = ceil_div(n_cols, Gemm<V>::kPanelCols);
      for (std::int64_t j = 0; j < n_panels; ++j) {
        prefetch_operand<V>(operand, rows.begin + next, next_height, depth_begin, depth, j,
                            n_panels);
        const float* panel = panels_ + j * Gemm<V>::kPanelSize;
        const std::int64_t c = j * Gemm<V>::kPanelCols;
        float* block = block_ + i * Gemm<V>::kCols + c;
        if (n_cols - c > V::kWidth) {
          gemm_tile_rows<V, kProduct, 2>(height, steps, operand_, panel, block, Gemm<V>::kCols,
                                         accumulate);
        } else {
          gemm_tile_rows<V, kProduct, 1>(height, steps, operand_, panel, block, Gemm<V>::kCols,
                                         accumulate);
        }
      }
    }
  }

  void mask_block(const Dropout& dropout, Range rows, Range cols) {
    for (std::int64_t m = rows.begin; m < rows.end; ++m) {
      const DropoutRow<V> mask(dropout, m);
      float* row = block_ + (m - rows.begin) * Gemm<V>::kCols;
      for (std::int64_t c = cols.begin; c < cols.end; c += V::kWidth, row += V::kWidth) {
        V::store(row, mask.apply(V::load(row), c));
      }
    }
  }

  template <class T>
  void write_block(Range rows, Range cols, bool started) {
    const T* bias = static_cast<const T*>(output_.bias);
    for (std::int64_t m = rows.begin; m < rows.end; ++m) {
      const float* row = block_ + (m - rows.begin) * Gemm<V>::kCols - cols.begin;
      T* out = static_cast<T*>(output_.data) + m * output_.row_stride;
      std::int64_t c = cols.begin;
      if (output_.col_stride == 1) {
        for (; c + V::kWidth <= cols.end; c += V::kWidth) {
          auto v = started ? V::load(row + c) : V::zero();
          if (bias != nullptr) v = V::add(v, V::load(bias + c));
          V::store(out + c, v);
        }
      }
      for (; c < cols.end; ++c) {
        const float value = started ? row[c] : 0.0f;
        out[c * output_.col_stride] =
            from_float<T>(bias == nullptr ? value : value + to_float(bias[c]));
      }
    }
  }

  const Segment* segments_;
  int n_segments_;
  const GemmOutput& output_;
  float* panels_;   // [kPanels][kSteps][kPanelCols]
  float* operand_;  // [kRows][kOperandStride]
  float* block_;    // [kRowChunk][kCols]
};

// How C is cut among threads.
struct GemmGrid {
  std::int64_t row_parts = 1, col_parts = 1;

  [[gnu::always_inline]] std::int64_t size() const { return row_parts * col_parts; }
};

template <class V>
GemmGrid gemm_grid(std::int64_t m, std::int64_t n, std::int64_t depth, int threads) {
  constexpr std::int64_t kLeastWork = std::int64_t{1}
                                      << 18;  // products; below it a thread costs more
  if (threads <= 1 || m * n * depth < kLeastWork) return {};
  const std::int64_t row_tiles = ceil_div(m, Gemm<V>::kRows);
  const std::int64_t panels = ceil_div(n, Gemm<V>::kPanelCols);
  GemmGrid grid;
  // A tall C of few columns (u = x A^T) is cut by rows, for the operand is what costs there.
  if (n * 4 < m) {
    grid.row_parts = least(threads, row_tiles);
    grid.col_parts = least(threads / grid.row_parts, panels);
  } else {
    grid.col_parts = least(threads, panels);
    grid.row_parts = least(threads / grid.col_parts, row_tiles);
  }
  return grid;
}

// One product, planned: what it needs is known before anything is written. The default: none.
template <class V>
class GemmPlan {
 public:
  static constexpr int kMaxSegments = 2;

  GemmPlan() = default;

  template <int kSegments>
  GemmPlan(std::int64_t m, std::int64_t n, const Segment (&segments)[kSegments],
           const GemmOutput& output, const Context& context)
      : m_(m), n_(n), n_segments_(kSegments), output_(output) {
    static_assert(kSegments <= kMaxSegments);
    std::int64_t depth = 0;
    for (int s = 0; s < kSegments; ++s) {
      segments_[s] = segments[s];
      depth += segments[s].depth;
    }
    grid_ = gemm_grid<V>(m, n, depth, context.threads);
  }

  [[nodiscard]] std::int64_t scratch_floats() const {
    return m_ == 0 || n_ == 0 ? 0 : grid_.size() * GemmRun<V>::kScratchFloats;
  }

  void run(float* scratch, const Context& context) const {
    if (m_ == 0 || n_ == 0) return;
    parallel_parts(context, grid_.size(), [&](std::int64_t part) {
      GemmRun<V> run(segments_, n_segments_, output_, scratch + part * GemmRun<V>::kScratchFloats);
      run.run(Range{0, m_}.part(part % grid_.row_parts, grid_.row_parts, Gemm<V>::kRows),
              Range{0, n_}.part(part / grid_.row_parts, grid_.col_parts, Gemm<V>::kPanelCols));
    });
  }

 private:
  std::int64_t m_ = 0, n_ = 0;
  Segment segments_[kMaxSegments] = {};
  int n_segments_ = 0;
  GemmOutput output_ = {};
  GemmGrid grid_;
};

// One product after the other, in the same scratch. Nothing is written where memory is short.
template <class V, int kPlans>
Status run_products(const GemmPlan<V> (&plans)[kPlans], const Context& context) {
  std::int64_t floats = 0;
  for (const auto& plan : plans) {
    if (plan.scratch_floats() > floats) floats = plan.scratch_floats();
  }
  const Workspace workspace(static_cast<std::size_t>(floats) * sizeof(float));
  auto* scratch = workspace.as<float>();
  if (scratch == nullptr) return kOutOfMemory;
  for (const auto& plan : plans) plan.run(scratch, context);
  return {};
}

}  // namespace qlora::cpu
