// How linear_few_rows.cuh shares its work out, by the number of columns of the product.
//
// y^T [N, M] = W [N, K] x^T [K, M]: a block of 8 warps takes `kRows` rows of W and walks along K in
// steps of `kDepth`. A warp takes 32 of these rows, two of the tensor cores' 16, and 64 values of
// each step's depth, so that 8 warps are kRowWarps x kDepthWarps of those:
//
//   columns  8 kTiles   row warps x depth warps   rows x depth of a step   codes  x (all columns)
//         8   1               1 x 8                  32 x 512               8 kB    8 kB
//        16   2               2 x 4                  64 x 256               8 kB    8 kB
//        32   4               4 x 2                 128 x 128               8 kB    8 kB
//        64   8               4 x 2                 128 x 128               8 kB   16 kB
//
// Every block reads all of its x again, out of the second-level cache: 4 M / kRows bytes for a byte
// of codes. That is why more columns take more rows, and depth is what is left to share: few rows
// make many blocks, so that M <= 8 needs no second launch to add up what blocks found (split K).
#pragma once

#include <cstdint>

#include "device/thread.cuh"

namespace qlora::cuda {

inline constexpr int kFewRowsThreads = 256;
inline constexpr int kChunk = 64;      // values of a row that a warp takes in a step
inline constexpr int kRowTiles = 2;    // of 16 rows, of a warp
inline constexpr int kCodePiece = 32;  // values of a row in 16 bytes
inline constexpr int kXPiece = 8;      // values of x in 16 bytes

// kUnit values of a row, 64 or 32, have one scale.
template <int kColumnTiles, int kUnitValues>
struct FewRowsShape {
  static constexpr int kTiles = kColumnTiles;  // of 8 columns
  static constexpr int kUnit = kUnitValues;
  static constexpr int kWarps = kFewRowsThreads / kWarpSize;
  static constexpr int kRowWarps = kTiles < 4 ? kTiles : 4;
  static constexpr int kDepthWarps = kWarps / kRowWarps;
  static constexpr int kRows = kRowWarps * kRowTiles * 16;
  static constexpr int kDepth = kDepthWarps * kChunk;
  static constexpr int kStages = 4;

  static constexpr int kUnitsOfChunk = kChunk / kUnit;
  static constexpr int kMmasOfUnit = kUnit / 16;
  static constexpr int kFragments = kRowTiles * kTiles;  // of a warp's sums
  // Fragments of a block's sums, a lane's part of each: four values.
  static constexpr int kSums = kRowWarps * kFragments * kWarpSize;
  static_assert(kUnit == 64 || kUnit == 32);
  // Units of 32 for 64 columns would take more than a thread's 255 registers.
  static_assert(kTiles == 1 || kTiles == 2 || kTiles == 4 || (kTiles == 8 && kUnit == 64));
};

// Where a thread stands in its block.
template <class Shape>
struct FewRowsPlace {
  int warp_row;    // of kRowWarps
  int warp_depth;  // of kDepthWarps
  int group;       // lane / 4: a row of W, a column of the product
  int quarter;     // lane % 4: a quarter of a unit

  __device__ FewRowsPlace()
      : warp_row(warp_index() % Shape::kRowWarps),
        warp_depth(warp_index() / Shape::kRowWarps),
        group(lane_index() / 4),
        quarter(lane_index() % 4) {}
};

}  // namespace qlora::cuda
