// Panels: tiles of 16-bit values in shared memory, rows of 64 values, that matrix loads read
// without bank conflicts.
//
// A row is 128 bytes, all 32 banks once: 8 pieces of 8 values. Piece p of row r stands at place
// p ^ (r % 8) of its row. So the 8 rows that a matrix load (plain or transposed) fetches of one
// piece lie in 8 different groups of banks, and so do the 8 pieces of a row, which neighbouring
// threads copy in. (It is the swizzle that TMA and wgmma call 128 bytes.)
#pragma once

#include <cstdint>

#include "device/async_copy.cuh"
#include "device/thread.cuh"
#include "kernels/tile_shape.h"

namespace qlora::cuda {

inline constexpr int kPanelColumns = 64;
inline constexpr int kPiece = 8;  // values: 16 bytes
static_assert(kTileDepth == kPanelColumns);

// Where the first piece of a row stands, from the panel's first element. The others lie at that ^
// their column: p ^ (r % 8) in units of a piece. A panel begins at a multiple of 64.
__device__ inline int panel_row(int row) { return row * kPanelColumns + (row & 7) * kPiece; }

// A row-major matrix in global memory, aligned to 16 bytes, of whole pieces: columns % 8 == 0.
template <class T>
struct RowMajor {
  Global<const T> data{};
  std::int64_t rows = 0;
  std::int64_t columns = 0;
};

// Starts the copies of kRows x 64 values from (row, column) on into the panel at element `base`.
// What lies outside of the matrix becomes zeros. A piece a thread, 8 threads a row: a warp reads
// 128 contiguous bytes of each of four rows. By the block's first kThreads threads.
template <int kRows, int kThreads = kLinearThreads, class T>
__device__ void copy_panel(Shared<T> to, int base, const RowMajor<T>& from, std::int64_t row,
                           std::int64_t column) {
  constexpr int kPieces = kPanelColumns / kPiece;
  constexpr int kRowsAtATime = kThreads / kPieces;
  static_assert(kRows % kRowsAtATime == 0 && kRowsAtATime % 8 == 0);
  const int own_row = thread_index() / kPieces;
  const int own_column = thread_index() % kPieces * kPiece;
  const int own_place = base + (panel_row(own_row) ^ own_column);
  const std::int64_t first = (row + own_row) * from.columns + column + own_column;
  const std::int64_t rest = column + own_column < from.columns ? from.rows - row : 0;
  const int rows_there = static_cast<int>(rest < kRows ? rest : kRows);
#pragma unroll
  for (int i = 0; i < kRows; i += kRowsAtATime) {
    async_copy<16>(to, own_place + i * kPanelColumns, from.data, first + i * from.columns,
                   own_row + i < rows_there);
  }
}

}  // namespace qlora::cuda
