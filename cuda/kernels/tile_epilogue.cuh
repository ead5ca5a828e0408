// What happens to a warp's sums besides products: dropout's mask, and the way out.
//
// A lane holds two neighbouring columns of each 8; four lanes hold the 8. Four such groups of
// columns, exchanged among those four lanes, give each lane the 8 columns of one group: 16 bytes of
// a 16-bit result, and the four lanes 64 contiguous bytes, whole sectors. No shared memory, no
// barrier: a warp that is done stores while others still multiply.
//
// A Tile is what a warp has of the block's: kDown groups of 16 rows by kAcross of 8 columns, value
// i of each at row_of(down, i), column_of(across, i) of that tile (warp_tile.cuh).
#pragma once

#include <cstdint>

#include "device/convert.cuh"
#include "device/global.cuh"
#include "device/warp.cuh"
#include "kernels/warp_tile.cuh"
#include "qlora_native/dropout.h"

namespace qlora::cuda {

struct TileDropout {
  Global<const std::int64_t> seed{};  // [1]
  std::uint32_t threshold = 0;        // 0: nothing is dropped
  float gain = 1.0f;
};

// Value [m, k] of the result times 0 or the gain. A row's key takes two 64-bit multiplications:
// each lane makes those of a few of the warp's rows, and hands them round.
template <class Tile>
__device__ void apply_dropout(Tile& tile, const TileDropout& dropout, std::int64_t row,
                              std::int64_t column) {
  constexpr int kRowsOfLane = (Tile::kRows + kWarpSize - 1) / kWarpSize;
  const auto seed = static_cast<std::uint64_t>(dropout.seed.load(0));
  DropoutRowKey keys[kRowsOfLane];
#pragma unroll
  for (int i = 0; i < kRowsOfLane; ++i) {
    keys[i] = dropout_row_key(seed, row + Tile::first_row() + i * kWarpSize + lane_index());
  }
#pragma unroll
  for (int down = 0; down < Tile::kRows; down += 8) {
    const DropoutRowKey& owned = keys[down / kWarpSize];
    const int owner = down % kWarpSize + lane_index() / 4;
    const DropoutRowKey key{shuffle(owned.add, owner), shuffle(owned.mix, owner)};
#pragma unroll
    for (int j = 0; j < Tile::kAcross; ++j) {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const auto at = static_cast<std::uint32_t>(column + Tile::column_of(j, v));
        const int i = down / 8 % 2 * 2 + v;
        const float sum = tile.get(down / kMmaRows, j, i);
        tile.set(down / kMmaRows, j, i,
                 dropout_keeps(key, at, dropout.threshold) ? sum * dropout.gain : 0.0f);
      }
    }
  }
}

// The tile's result, and what is added to it.
template <class T>
struct TileOutput {
  Global<T> data;  // [rows, columns]
  std::int64_t rows;
  std::int64_t columns;
  bool whole_pieces;       // rows are multiples of 16 bytes and begin at such
  Global<const T> bias{};  // [columns]
  bool has_bias = false;
};

// word[i] of lane t of four becomes word[t] of lane i.
__device__ inline void transpose_quad(std::uint32_t (&word)[4]) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = (lane_index() & bit) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & bit) != 0) continue;
      const std::uint32_t got = shuffle_xor(upper ? word[i] : word[i | bit], bit);
      (upper ? word[i] : word[i | bit]) = got;
    }
  }
}

// Eight values from (row, column) on, as far as the result reaches.
template <class T>
__device__ void store_piece(const TileOutput<T>& out, std::int64_t row, std::int64_t column,
                            const Vec<T, kPiece>& values) {
  if (row >= out.rows || column >= out.columns) return;
  const std::int64_t first = row * out.columns + column;
  if (out.whole_pieces) {
    out.data.store_vec(first, values);
    return;
  }
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    if (column + i < out.columns) out.data.store(first + i, values.value[i]);
  }
}

// The sums, plus bias, rounded to T; (row, column) is where the block's tile begins.
template <class Tile, class T>
__device__ void store_tile(const Tile& tile, const TileOutput<T>& out, std::int64_t row,
                           std::int64_t column) {
  struct Words {
    std::uint32_t word[4];
  };
#pragma unroll
  for (int first = 0; first < Tile::kAcross; first += 4) {
    float bias[4][2] = {};
    if (out.has_bias) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int v = 0; v < 2; ++v) {
          const std::int64_t at = column + Tile::column_of(first + j, v);
          if (at < out.columns) bias[j][v] = widen(out.bias.load(at));
        }
      }
    }
    const int own_column = Tile::first_column() + (first + lane_index() % 4) * kMmaColumns;
#pragma unroll
    for (int i = 0; i < Tile::kDown; ++i) {
#pragma unroll
      for (int lower = 0; lower < 4; lower += 2) {
        Words words;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          words.word[j] = narrow_pair<T>(tile.get(i, first + j, lower) + bias[j][0],
                                         tile.get(i, first + j, lower + 1) + bias[j][1]);
        }
        transpose_quad(words.word);
        store_piece(out, row + Tile::row_of(i, lower), column + own_column,
                    std::bit_cast<Vec<T, kPiece>>(words));
      }
    }
  }
}

}  // namespace qlora::cuda
