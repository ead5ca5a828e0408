// The left-hand side of the packed product: rows of A copied, widened and masked into a small
// block.
//
// The block is row-major with the fixed stride that gemm_tile reads. A copy and no transposition:
// the tile broadcasts, so a row may stay a row. fp32 rows are copied too, for rows a power of two
// apart would all fall on the same few cache sets; a block (at most 14 rows of 384) is copied once
// for each kCols columns of C, about 1 % of the multiplications' time.
//
// Rows come from the last-level cache or from memory, each from a page of its own: without the
// prefetching below, copying cost 15 % of a 512 x 4096 x 4096 product (Zen 4, fp32), not 1 %.
#pragma once

#include <cstdint>
#include <cstring>

#include "dropout_inl.h"
#include "gemm_tile_inl.h"
#include "qlora_native/dispatch.h"
#include "qlora_native/types.h"

namespace qlora::cpu {

// A[i][d] = factor * data[i * row_stride + d * depth_stride], dropped out where the mask says so.
struct Operand {
  DType dtype;
  const void* data;
  std::int64_t row_stride;
  std::int64_t depth_stride = 1;
  float factor = 1.0f;
  Dropout dropout = {};  // needs depth_stride 1; its gain is part of `factor`
};

template <class V, class T>
void pack_row(const Operand& operand, std::int64_t row, const T* from, std::int64_t depth_begin,
              std::int64_t depth, float* to) {
  const auto factor = V::set1(operand.factor);
  const bool scaled = operand.factor != 1.0f;
  const DropoutRow<V> mask(operand.dropout, row);
  std::int64_t d = 0;
  const auto finish = [&](typename V::F v) {
    if (scaled) v = V::mul(v, factor);
    if (operand.dropout.active) v = mask.apply(v, depth_begin + d);
    V::store(to + d, v);
  };
  for (; d + V::kWidth <= depth; d += V::kWidth) finish(V::load(from + d));
  if (d < depth) finish(V::load_n(from + d, depth - d));
}

// Rows `row`.. and depths `depth_begin`.. of the operand into block[rows][kOperandStride].
template <class V>
void pack_operand(const Operand& operand, std::int64_t row, std::int64_t rows,
                  std::int64_t depth_begin, std::int64_t depth, float* block) {
  constexpr std::int64_t kStride = Gemm<V>::kOperandStride;
  with_type(operand.dtype, [&]<class T>() {
    for (std::int64_t i = 0; i < rows; ++i) {
      const T* from = static_cast<const T*>(operand.data) + (row + i) * operand.row_stride +
                      depth_begin * operand.depth_stride;
      float* to = block + i * kStride;
      if (operand.depth_stride == 1) {
        pack_row<V>(operand, row + i, from, depth_begin, depth, to);
      } else {
        for (std::int64_t d = 0; d < depth; ++d) {
          to[d] = operand.factor * to_float(from[d * operand.depth_stride]);
        }
      }
    }
  });
}

// The same for bf16 rows that stay bf16: two neighbours in depth are one step, as they lie.
template <class V>
void pack_operand_pairs(const Operand& operand, std::int64_t row, std::int64_t rows,
                        std::int64_t depth_begin, std::int64_t depth, float* block) {
  for (std::int64_t i = 0; i < rows; ++i) {
    const auto* from =
        static_cast<const BFloat16*>(operand.data) + (row + i) * operand.row_stride + depth_begin;
    auto* to = reinterpret_cast<char*>(block + i * Gemm<V>::kOperandStride);
    const auto bytes = static_cast<std::size_t>(depth) * sizeof(BFloat16);
    std::memcpy(to, from, bytes);
    if (depth % 2 != 0) std::memset(to + bytes, 0, sizeof(BFloat16));
  }
}

// Asks for part `part` of `n_parts` of what the packing of these rows will read.
template <class V>
[[gnu::always_inline]] inline void prefetch_operand(const Operand& operand, std::int64_t row,
                                                    std::int64_t rows, std::int64_t depth_begin,
                                                    std::int64_t depth, std::int64_t part,
                                                    std::int64_t n_parts) {
  if (operand.depth_stride != 1) return;
  const std::int64_t size = size_of(operand.dtype);
  for (std::int64_t i = rows * part / n_parts; i < rows * (part + 1) / n_parts; ++i) {
    const char* from = static_cast<const char*>(operand.data) +
                       ((row + i) * operand.row_stride + depth_begin) * size;
    for (std::int64_t at = 0; at < depth * size; at += kCacheLine) V::prefetch_far(from + at);
  }
}

}  // namespace qlora::cpu
