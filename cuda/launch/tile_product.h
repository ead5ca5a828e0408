// The arguments of the kernels that compute a product in tiles (kernels/tile_product.cuh).
#pragma once

#include <cstdint>

#include "kernels/tile_product.cuh"
#include "launch/linear_paths.h"
#include "launch/tiles.h"
#include "qlora_native/params.h"

namespace qlora::cuda {

// What the two directions share: out [M, columns] = x [M, depth] and the weight.
struct Product {
  std::int64_t m;
  std::int64_t depth;
  std::int64_t columns;
  const Weight4bit& weight;
  DType dtype;
  const void* x;
  const void* bias;
  void* out;
};

inline Product product_of(const LinearParams& p) {
  return {p.m, p.weight.cols, p.weight.rows, p.weight, p.dtype, p.x, p.bias, p.out};
}

inline Product product_of(const LinearBackwardInputParams& p) {
  return {p.m, p.weight.rows, p.weight.cols, p.weight, p.dtype, p.grad_out, nullptr, p.grad_x};
}

inline TileWeight tile_weight(const Weight4bit& w) {
  const std::int64_t n = w.rows * w.cols;
  TileWeight weight{.rows = w.rows,
                    .columns = w.cols,
                    .log2_blocksize = log2_of(w.blocksize),
                    .double_quantized = w.scales.double_quantized(),
                    .packed = {w.packed, packed_bytes(n)},
                    .scales = device_scales(w.scales, n_blocks(n, w.blocksize)),
                    .values = {}};
  for (int i = 0; i < 16; ++i) weight.values[i] = w.format.values[i];
  return weight;
}

template <class T>
RowMajor<T> row_major(const void* data, std::int64_t rows, std::int64_t columns) {
  return {{static_cast<const T*>(data), rows * columns}, rows, columns};
}

// For tiles of so many rows.
template <class T>
TileProduct<T> tile_product(const Product& p, const LoraTerm* lora, int tile_rows) {
  TileProduct<T> a{.x = row_major<T>(p.x, p.m, p.depth),
                   .weight = tile_weight(p.weight),
                   .out = {.data = {static_cast<T*>(p.out), p.m * p.columns},
                           .rows = p.m,
                           .columns = p.columns,
                           .whole_pieces = p.columns % kPiece == 0},
                   .tiles_down = static_cast<std::uint32_t>(ceil_div(p.m, tile_rows))};
  a.out.whole_pieces = a.out.whole_pieces && a.out.data.aligned(16);
  if (p.bias != nullptr) {
    a.out.bias = {static_cast<const T*>(p.bias), p.columns};
    a.out.has_bias = true;
  }
  if (lora != nullptr) {
    a.left = row_major<T>(lora->left, p.m, lora->r);
    a.right = row_major<T>(lora->right, p.columns, lora->r);
    if (lora->dropout_p > 0.0f) {
      a.dropout = {.seed = {lora->dropout_seed, 1},
                   .threshold = dropout_threshold(lora->dropout_p),
                   .gain = dropout_gain(lora->dropout_p)};
    }
  }
  return a;
}

}  // namespace qlora::cuda
