// A 4-bit weight's tiles for wgmma, written by one warpgroup: from codes in shared memory
// (code_panels.cuh) to 16-bit values in swizzled rows.
//
// A step's tile has 256 rows of 64 values: in the forward product a row of W each, in the input
// gradient four panels of 64 rows of W, side by side. Either way a thread dequantizes two of these
// rows, 128 apart, by look-ups in registers (weight_tile.cuh: 3.6 instructions a value and
// lane, 3.1 where 64 values have one scale; 400 to 461 a warp and step, and 690 to 815 with scales,
// addresses and the copies of x, of the 1024 clocks that wgmma takes for it). The scales of a step
// are loaded a step ahead.
//
// Banks: what eight neighbouring threads store, the same piece of eight rows, lies in eight groups
// of banks by the swizzle.
#pragma once

#include <cstdint>

#include "device/shared.cuh"
#include "device/thread.cuh"
#include "kernels/code_panels.cuh"
#include "kernels/panel.cuh"
#include "kernels/warp_tile.cuh"
#include "kernels/weight_tile.cuh"
#include "kernels/wgmma_shape.h"

namespace qlora::cuda {

template <class T, DepthOfRight kDepth>
class WeightProducer {
  static constexpr bool kForward = kDepth == DepthOfRight::along_rows;
  static constexpr int kRows = kWgmmaTileColumns / kWgmmaProducerThreads;  // of a thread
  static constexpr int kChunks = kPanelColumns / kWeightChunk;             // of a row

 public:
  // For the columns from `column` on.
  __device__ WeightProducer(const TileWeight& weight, const CodePanels<kDepth>& codes, Shared<T> to,
                            DynamicMap& map, std::int64_t column)
      : weight_(weight),
        codes_(codes),
        to_(to),
        map_(map),
        column_(column),
        one_scale_a_row_(kPanelColumns >> weight.log2_blocksize <= 1 &&
                         weight.columns % kPanelColumns == 0) {
    load_scales(0);
  }

  // The tile of that step (0, 1, 2, …) into the rows from element `base` on.
  __device__ void write(int step, int base) {
    if (step % kStepsOfCodePanel == 0) codes_.wait(step);
    float absmax[kRows][kChunks];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        absmax[i][chunk] = absmax_of(weight_, scales_[i][chunk], map_);
      }
    }
    load_scales(step + 1);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = row_of(i);
      ScaledValues<T> scaled(weight_.values, absmax[i][0]);
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        if (chunk > 0 && !one_scale_a_row_) {
          scaled = ScaledValues<T>(weight_.values, absmax[i][chunk]);
        }
        WeightChunk::Codes codes{};  // outside of the weight: codes whose scale is zero
        if (is_there(step, row, chunk)) codes = codes_.load(step, row, chunk);
#pragma unroll
        for (int piece = 0; piece < kWeightChunk / kPiece; ++piece) {
          const int column = chunk * kWeightChunk + piece * kPiece;
          to_.store_vec((base + panel_row(row)) ^ column, scaled.look_up(codes.word[piece]));
        }
      }
    }
  }

 private:
  // Of the tile: the thread's i-th row.
  __device__ static int row_of(int i) { return thread_index() + i * kWgmmaProducerThreads; }

  // Of the weight: where the chunk-th 32 values of that row of the tile are.
  __device__ std::int64_t weight_row(int step, int row) const {
    return kForward ? column_ + row : std::int64_t{step} * kTileDepth + row % kTileDepth;
  }
  __device__ std::int64_t weight_column(int step, int row, int chunk) const {
    const std::int64_t first =
        kForward ? std::int64_t{step} * kTileDepth : column_ + row / kTileDepth * kPanelColumns;
    return first + chunk * kWeightChunk;
  }
  __device__ bool is_there(int step, int row, int chunk) const {
    return weight_row(step, row) < weight_.rows &&
           weight_column(step, row, chunk) < weight_.columns;
  }

  __device__ void load_scales(int step) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        scales_[i][chunk] = {};
        if (chunk > 0 && one_scale_a_row_) continue;
        if (!is_there(step, row_of(i), chunk)) continue;
        scales_[i][chunk] =
            load_chunk_scale(weight_, weight_row(step, row_of(i)) * weight_.columns +
                                          weight_column(step, row_of(i), chunk));
      }
    }
  }

  const TileWeight& weight_;
  const CodePanels<kDepth>& codes_;
  Shared<T> to_;
  DynamicMap& map_;
  std::int64_t column_;
  bool one_scale_a_row_;
  ChunkScale scales_[kRows][kChunks];  // of the next step
};

}  // namespace qlora::cuda
