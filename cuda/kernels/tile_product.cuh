// A product with a 4-bit weight as the kernels that compute it in tiles are given it:
// linear_tiles.cuh and linear_wgmma.cuh.
//
//   out [M, N] = x W^T + left right^T + bias        the forward direction
//   out [M, K] = x W + drop'(left right^T)          the input gradient, x [M, N] being grad_out
#pragma once

#include <cstdint>

#include "kernels/panel.cuh"
#include "kernels/tile_epilogue.cuh"
#include "kernels/weight_tile.cuh"

namespace qlora::cuda {

template <class T>
struct TileProduct {
  RowMajor<T> x;  // [M, depth]: x, or grad_out
  TileWeight weight;
  TileOutput<T> out;            // [M, N] or [M, K]
  std::uint32_t tiles_down;     // of the result
  RowMajor<T> left{}, right{};  // [M, R], [columns of the result, R]; R = 0: no LoRA
  TileDropout dropout{};        // of left right^T
};

}  // namespace qlora::cuda
