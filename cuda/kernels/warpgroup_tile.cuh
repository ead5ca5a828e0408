// What a consuming warpgroup computes of a tile: 64 rows of it by all 256 columns, in registers.
#pragma once

#include "device/thread.cuh"
#include "device/warpgroup.cuh"
#include "device/wgmma.cuh"
#include "kernels/operand_ring.cuh"
#include "kernels/warp_tile.cuh"
#include "kernels/wgmma_shape.h"

namespace qlora::cuda {

// A Tile of tile_epilogue.cuh: a warp has 16 rows.
struct WarpgroupTile {
  static constexpr int kRows = kMmaRows;
  static constexpr int kDown = 1;
  static constexpr int kAcross = kWgmmaTileColumns / kMmaColumns;

  WgmmaSums sums;

  // Warpgroup 0 is the producer.
  __device__ static int first_row() {
    return thread_index() / kWarpSize * kMmaRows - kWgmmaProducerThreads / kWarpSize * kMmaRows;
  }
  __device__ static int first_column() { return 0; }
  __device__ static int row_of(int, int i) { return first_row() + lane_index() / 4 + i / 2 * 8; }
  __device__ static int column_of(int across, int i) {
    return across * kMmaColumns + lane_index() % 4 * 2 + i % 2;
  }
  [[nodiscard]] __device__ float get(int, int across, int i) const {
    return sums.get(4 * across + i);
  }
  __device__ void set(int, int across, int i, float sum) { sums.set(4 * across + i, sum); }

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < WgmmaSums::kValues; ++i) sums.set(i, 0.0f);
  }

  // So many steps of the ring. A step's products are under way while those of the next are started:
  // only then is its stage given back. Meanwhile, after(step); step is full then.
  template <DepthOfRight kDepth, class T, class Fn>
  __device__ void multiply_steps(const OperandRing<T>& ring, RingPlace& place, int steps,
                                 Fn&& after) {
    const int own_rows = first_row() / kWgmmaRows * kWgmmaRows * kPanelColumns;
    int last_stage = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int x = place.stage * ring.kX + own_rows;
      const int weights = place.stage * ring.kWeights;
      place.wait_full(ring.barriers);
      fence_products();
#pragma unroll
      for (int depth = 0; depth < kTileDepth; depth += kWgmmaDepth) {
        const MatrixDescriptor left = describe_depth_along_rows(ring.x, x, depth);
        if constexpr (kDepth == DepthOfRight::along_rows) {
          multiply_add<T, false>(sums, left,
                                 describe_depth_along_rows(ring.weights, weights, depth));
        } else {
          multiply_add<T, true>(
              sums, left,
              describe_depth_across_rows(ring.weights, weights, depth, kTileDepth * kPanelColumns));
        }
      }
      commit_products();
      if (step > 0) {
        wait_products<1>(sums);
        give_back(ring, last_stage);
      }
      after(step);
      last_stage = place.stage;
      place.next();
    }
    wait_products<0>(sums);
    if (steps > 0) give_back(ring, last_stage);
  }

 private:
  // The warp's products that read the stage are over.
  template <class T>
  __device__ static void give_back(const OperandRing<T>& ring, int stage) {
    if (lane_index() == 0) arrive(ring.barriers, kEmptyBarrier + stage);
  }
};

}  // namespace qlora::cuda
