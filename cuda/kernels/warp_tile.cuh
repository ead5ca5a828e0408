// What a warp computes of a tile: its share of the result in registers, and the products that go
// into it, operands from panels in shared memory.
//
//   sums [warp_rows, warp_columns] += left [warp_rows, 16] right [16, warp_columns]
//
// Left's panel has a row for each row of the result. Right's has either a row for each column of
// the result (the depth runs along it: W [n][k] in the forward product), or a row for each step of
// the depth (the input gradient), read transposed; the same fragments come out.
#pragma once

#include "device/matrix.cuh"
#include "device/mma.cuh"
#include "kernels/panel.cuh"

namespace qlora::cuda {

inline constexpr int kMmaRows = 16;
inline constexpr int kMmaColumns = 8;
inline constexpr int kMmaDepth = 16;

enum class DepthOfRight { along_rows, across_rows };

template <TileShape kShape>
struct WarpTile {
  static constexpr int kRows = kShape.warp_rows();
  static constexpr int kDown = kRows / kMmaRows;
  static constexpr int kAcross = kShape.warp_columns() / kMmaColumns;
  static_assert(kAcross % 4 == 0);

  Accumulator sums[kDown][kAcross];

  // In the tile: where the warp's part begins.
  __device__ static int first_row() {
    return warp_index() / kShape.warps_across() * kShape.warp_rows();
  }
  __device__ static int first_column() {
    return warp_index() % kShape.warps_across() * kShape.warp_columns();
  }

  // Of value i of sums[down][across]: fragments.cuh.
  __device__ static int row_of(int down, int i) {
    return first_row() + down * kMmaRows + lane_index() / 4 + i / 2 * 8;
  }
  __device__ static int column_of(int across, int i) {
    return first_column() + across * kMmaColumns + lane_index() % 4 * 2 + i % 2;
  }

  [[nodiscard]] __device__ float get(int down, int across, int i) const {
    return sums[down][across].value[i];
  }
  __device__ void set(int down, int across, int i, float sum) { sums[down][across].value[i] = sum; }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) sums[i][j] = {};
    }
  }

  // One step of 16, the step-th of the panels that begin at these elements. (Addresses are written
  // so that what differs between unrolled steps is a constant.)
  template <DepthOfRight kDepth, class T>
  __device__ void multiply_add(Shared<T> left, int left_base, Shared<T> right, int right_base,
                               int step) {
    const int lane = lane_index();
    // Right's fragments stay, left's pass by.
    FragmentB b[kAcross];
#pragma unroll
    for (int j = 0; j < kAcross; j += 2) {
      const Matrices m = load_right<kDepth>(right, right_base, step, j);
      b[j] = {{m.word[0], m.word[1]}};
      b[j + 1] = {{m.word[2], m.word[3]}};
    }
    const int own = panel_row(first_row() + lane % 16) ^ (lane / 16 * kPiece);
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
      const int below = i * kMmaRows * kPanelColumns;
      const Matrices m = load_matrices(left, ((left_base + own) ^ (step * kMmaDepth)) + below);
      const FragmentA a{{m.word[0], m.word[1], m.word[2], m.word[3]}};
#pragma unroll
      for (int j = 0; j < kAcross; ++j) mma_m16n8k16<T>(sums[i][j], a, b[j]);
    }
  }

 private:
  // Of 16 columns of the result, from the warp's j-th 8 on: words 0 and 1 are the fragment of the
  // first 8.
  template <DepthOfRight kDepth, class T>
  __device__ static Matrices load_right(Shared<T> right, int base, int step, int j) {
    const int lane = lane_index();
    if constexpr (kDepth == DepthOfRight::along_rows) {
      const int row = first_column() + lane / 16 * 8 + lane % 8;
      const int own = panel_row(row) ^ (lane / 8 % 2 * kPiece);
      const int piece = (base + own) ^ (step * kMmaDepth);
      return load_matrices(right, piece + j * kMmaColumns * kPanelColumns);
    } else {
      static_assert(kPanelColumns % kShape.warp_columns() == 0);
      const int panel = first_column() / kPanelColumns * (kTileDepth * kPanelColumns);
      const int column = (first_column() & (kPanelColumns - 1)) + lane / 16 * kPiece;
      const int own = panel + (panel_row(lane % 16) ^ column);
      const int piece = (base + own) ^ (j * kMmaColumns);
      return load_matrices_transposed(right, piece + step * kMmaDepth * kPanelColumns);
    }
  }
};

}  // namespace qlora::cuda
