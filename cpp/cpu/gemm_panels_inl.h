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
#include "gemm_panels_4bit_inl.h"
#include "gemm_tile_inl.h"
#include "qlora_native/dispatch.h"

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

// take(i, v) for the vectors v of row `row` of the source's matrix from element `first` on: element
// first + i and its neighbours, 0 past the count. `scratch` holds a decoded row, `count` floats.
template <class V, class Take>
void read_row(const Source& source, std::int64_t row, std::int64_t first, std::int64_t count,
              float* scratch, const Take& take) {
  const auto read = [&](const auto* from, const auto& finish) {
    std::int64_t i = 0;
    for (; i + V::kWidth <= count; i += V::kWidth) take(i, finish(V::load(from + i), i));
    if (i < count) take(i, finish(V::load_n(from + i, count - i), i));
  };
  const auto as_it_is = [](typename V::F v, std::int64_t) { return v; };
  if (source.weight != nullptr) {
    decode_run<V>(*source.weight, row * source.weight->cols + first, count, scratch);
    return read(scratch, as_it_is);
  }
  with_type(source.dtype, [&]<class T>() {
    const T* from = static_cast<const T*>(source.data) + row * source.row_stride + first;
    if (!source.dropout.active) return read(from, as_it_is);
    const DropoutRow<V> mask(source.dropout, row);
    const auto gain = V::set1(source.dropout.gain);
    read(from,
         [&](typename V::F v, std::int64_t i) { return mask.apply(V::mul(v, gain), first + i); });
  });
}

// Rows of the matrix are depths: a run of a row is a run of every panel's row.
template <class V>
void pack_rows(const Source& source, const PanelBlock& block, float* panels) {
  constexpr std::int64_t kCols = Gemm<V>::kPanelCols;
  float scratch[Gemm<V>::kCols];
  for (std::int64_t d = 0; d < block.depth; ++d) {
    float* step = panels + d * kCols;
    const auto place = [&](std::int64_t c) {
      return step + c / kCols * Gemm<V>::kPanelSize + c % kCols;
    };
    read_row<V>(source, block.depth_begin + d, block.col_begin, block.cols, scratch,
                [&](std::int64_t c, typename V::F v) { V::store(place(c), v); });
  }
}

// Rows of the matrix are columns: a row is read as it lies and then strewn down its column.
template <class V>
void pack_columns(const Source& source, const PanelBlock& block, float* panels) {
  constexpr std::int64_t kCols = Gemm<V>::kPanelCols;
  float scratch[Gemm<V>::kSteps];
  for (std::int64_t c = 0; c < ceil_div(block.cols, V::kWidth) * V::kWidth; ++c) {
    float* to = panels + c / kCols * Gemm<V>::kPanelSize + c % kCols;
    const std::int64_t col = least(c, block.cols - 1);
    read_row<V>(source, block.col_begin + col, block.depth_begin, block.depth, scratch,
                [&](std::int64_t d, typename V::F v) {
                  float lanes[V::kWidth];
                  V::store(lanes, v);
                  const std::int64_t n = least(V::kWidth, block.depth - d);
                  for (std::int64_t i = 0; i < n; ++i) to[(d + i) * kCols] = lanes[i];
                });
  }
}

// Packs `block` of the source into consecutive panels of kPanelSize, as many whole vectors of each
// as hold a column: what lanes past the last column hold never reaches C. Pairs are made of 4-bit
// weights of whole vectors only (see product_of).
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
