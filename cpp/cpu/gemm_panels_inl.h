// The right-hand side of the packed product, from wherever it lies into panels.
//
// A panel is kPanelCols columns of P, depth after depth: [steps][kPanelCols] fp32, or bf16 pairs of
// two neighbouring depths. Packing a 4-bit weight IS its dequantization: the weight exists in fp32
// or bf16 for one block of the product at a time, in cache, and nowhere else.
//
// Here: the choice of the source, dense sources, and 4-bit weights whose rows start anywhere (an
// odd width, say). gemm_panels_4bit_inl.h has 4-bit weights whose rows are whole vectors of codes.
#pragma once

#include <cstdint>

#include "decode_inl.h"
#include "dropout_inl.h"
#include "dtype_dispatch.h"
#include "gemm_panels_4bit_inl.h"
#include "gemm_tile_inl.h"

namespace qlora::cpu {

// P[depth][column], read from a matrix whose rows are either the depths of P or, transposed, its
// columns. Either a 4-bit weight or a dense matrix.
struct Source {
  bool transposed;
  const Weight4bit* weight = nullptr;
  DType dtype = DType::float32;
  const void* data = nullptr;
  std::int64_t row_stride = 0;
  Dropout dropout = {};  // of a dense matrix; the gain is applied
};

// out[0..count) = row `row` of the source's matrix from element `first` on.
template <class V>
void read_row(const Source& source, std::int64_t row, std::int64_t first, std::int64_t count,
              float* out) {
  if (source.weight != nullptr) {
    return decode_run<V>(*source.weight, row * source.weight->cols + first, count, out);
  }
  const DropoutRow<V> mask(source.dropout, row);
  const auto gain = V::set1(source.dropout.gain);
  dispatch_dtype(source.dtype, [&]<class T>() {
    const T* from = static_cast<const T*>(source.data) + row * source.row_stride + first;
    for (std::int64_t i = 0; i < count; i += V::kWidth) {
      const std::int64_t n = count - i < V::kWidth ? count - i : V::kWidth;
      auto v = V::load_n(from + i, n);
      if (source.dropout.active) v = mask.apply(V::mul(v, gain), first + i);
      V::store_n(out + i, v, n);
    }
  });
}

// Rows of the matrix are depths: a run of a row is a run of a panel's row.
template <class V>
void pack_rows(const Source& source, const PanelBlock& block, float* panels) {
  constexpr std::int64_t kCols = Gemm<V>::kPanelCols;
  for (std::int64_t d = 0; d < block.depth; ++d) {
    float* to = panels + d * kCols;
    for (std::int64_t c = 0; c < block.cols; c += kCols, to += Gemm<V>::kPanelSize) {
      const std::int64_t n = block.cols - c < kCols ? block.cols - c : kCols;
      read_row<V>(source, block.depth_begin + d, block.col_begin + c, n, to);
      for (std::int64_t i = n; i < kCols; ++i) to[i] = 0.0f;
    }
  }
}

// Rows of the matrix are columns: a row is read as it lies and then strewn down its column.
template <class V>
void pack_columns(const Source& source, const PanelBlock& block, float* panels) {
  constexpr std::int64_t kCols = Gemm<V>::kPanelCols;
  float row[Gemm<V>::kSteps];
  for (std::int64_t c = 0; c < ceil_div(block.cols, kCols) * kCols; ++c) {
    float* to = panels + c / kCols * Gemm<V>::kPanelSize + c % kCols;
    if (c < block.cols) {
      read_row<V>(source, block.col_begin + c, block.depth_begin, block.depth, row);
      for (std::int64_t d = 0; d < block.depth; ++d) to[d * kCols] = row[d];
    } else {
      for (std::int64_t d = 0; d < block.depth; ++d) to[d * kCols] = 0.0f;
    }
  }
}

// Packs `block` of the source into consecutive panels of kPanelSize; columns past the last are 0 or
// repeat it: whatever they hold never reaches C. Pairs
// are made of 4-bit weights of whole vectors only (see product_of).
template <class V, Product kProduct>
void pack_panels(const Source& source, const PanelBlock& block, float* panels) {
  if (source.weight != nullptr && WholeRows<V>::fits(*source.weight)) {
    return source.transposed ? pack_weight_columns<V, kProduct>(*source.weight, block, panels)
                             : pack_weight_rows<V, kProduct>(*source.weight, block, panels);
  }
  if constexpr (kProduct == Product::fp32) {
    source.transposed ? pack_columns<V>(source, block, panels)
                      : pack_rows<V>(source, block, panels);
  }
}

}  // namespace qlora::cpu
