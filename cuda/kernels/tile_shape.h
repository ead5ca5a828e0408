// How a product is cut into tiles (linear_tiles.cuh), as data that launchers choose from.
#pragma once

namespace qlora::cuda {

inline constexpr int kLinearWarps = 8;
inline constexpr int kLinearThreads = kLinearWarps * 32;
inline constexpr int kTileColumns = 128;  // of the result: outputs of a block of threads
inline constexpr int kTileDepth = 64;     // of the product: a step
inline constexpr int kWeightTile = kTileColumns * kTileDepth;  // values; 32 for each thread
inline constexpr int kTileStages = 3;  // tiles of activations: one in use, two on their way

inline constexpr int kStaticSharedBytes = 1024;  // besides: the map of double-quantized scales

struct TileShape {
  int rows;                       // of the result
  int warps_down;                 // of the 8 warps of a block; the others stand side by side
  int blocks_per_multiprocessor;  // that the registers must leave room for

  [[nodiscard]] constexpr int warps_across() const { return kLinearWarps / warps_down; }
  // What a warp computes.
  [[nodiscard]] constexpr int warp_rows() const { return rows / warps_down; }
  [[nodiscard]] constexpr int warp_columns() const { return kTileColumns / warps_across(); }
  // Values of a tile of activations, and bytes of shared memory: those tiles and two of weights.
  [[nodiscard]] constexpr int activation_tile() const { return rows * kTileDepth; }
  [[nodiscard]] constexpr int shared_bytes() const {
    return 2 * (kTileStages * activation_tile() + 2 * kWeightTile);
  }
};

// Shared memory: 56, 80 and 128 kB.
inline constexpr TileShape kTile64{.rows = 64, .warps_down = 2, .blocks_per_multiprocessor = 2};
inline constexpr TileShape kTile128{.rows = 128, .warps_down = 2, .blocks_per_multiprocessor = 2};
inline constexpr TileShape kTile256{.rows = 256, .warps_down = 4, .blocks_per_multiprocessor = 1};

constexpr TileShape tile_of(int rows) {
  return rows == kTile256.rows ? kTile256 : rows == kTile128.rows ? kTile128 : kTile64;
}

}  // namespace qlora::cuda
