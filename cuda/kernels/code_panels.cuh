// A 4-bit weight's codes in shared memory, for the warpgroup that makes values of them: panels of
// 256 rows of W by 256 values, 128 bytes a row, by bulk copies. A panel serves four steps of 64
// depths:
//
//                  forward                          input gradient
//   panel p        rows of the tile's columns,      rows of depth 256 p …,
//                  values of depth 256 p …          values of the tile's columns
//   step s of it   a quarter of each row            a quarter of the rows
//
// The consumers ask for it, a row a thread: they have time while their products are under way,
// which the producer has not (a thread's copies are started one after another, some 30 clocks a
// lane). Panel p + 2 takes the place of p, and is asked for when the last of p's four steps is
// full: then all of the producer have read it. That is two steps or more before it is needed.
//
// Banks: rows are 144 bytes apart, so that eight neighbouring threads, which read 16 bytes of eight
// rows each, meet eight groups of banks.
#pragma once

#include <cstdint>

#include "device/bulk_copy.cuh"
#include "device/shared.cuh"
#include "device/thread.cuh"
#include "kernels/operand_ring.cuh"
#include "kernels/warp_tile.cuh"
#include "kernels/weight_tile.cuh"
#include "kernels/wgmma_shape.h"

namespace qlora::cuda {

inline constexpr int kStepsOfCodePanel = kCodePanel / kTileDepth;
static_assert(kCodePanel == kWgmmaTileColumns && kCodePanel == kWgmmaConsumers * 128);

template <DepthOfRight kDepth>
class CodePanels {
  static constexpr bool kForward = kDepth == DepthOfRight::along_rows;

 public:
  // For the columns from `column` on of a product of so many steps.
  __device__ CodePanels(const TileWeight& weight, Shared<Mbarrier> barriers, std::int64_t column,
                        int steps)
      : weight_(weight),
        codes_(swizzled_shared<std::uint8_t>(kWgmmaXBytes + kWgmmaWeightBytes, kWgmmaCodeBytes)),
        barriers_(barriers),
        column_(column),
        steps_(steps) {}

  // By all consumers, each for its row; of the weight, what is there.
  __device__ void fetch(int panel) const {
    if (panel * kStepsOfCodePanel >= steps_) return;
    const int row = thread_index() - kWgmmaProducerThreads;
    const std::int64_t depth = std::int64_t{panel} * kCodePanel;
    const std::int64_t weight_row = (kForward ? column_ : depth) + row;
    const std::int64_t weight_column = kForward ? depth : column_;
    const std::int64_t rest = weight_.columns - weight_column;
    const bool there = weight_row < weight_.rows;
    const int bytes = there ? static_cast<int>(rest < kCodePanel ? rest : kCodePanel) / 2 : 0;
    const int barrier = kCodesBarrier + panel % kCodePanels;
    arrive_expecting(barriers_, barrier, bytes);
    if (!there) return;
    bulk_copy(codes_, begin(panel) + row * kCodePitch, weight_.packed,
              (weight_row * weight_.columns + weight_column) / 2, bytes, barriers_, barrier);
  }

  // By the producer, before it reads the codes of a step, the first of its panel.
  __device__ void wait(int step) const {
    const int panel = step / kStepsOfCodePanel;
    wait_phase(barriers_, kCodesBarrier + panel % kCodePanels, panel / kCodePanels % 2);
  }

  // The codes of 32 values of row `row` of a step's tile (weight_producer.cuh), the chunk-th there.
  [[nodiscard]] __device__ WeightChunk::Codes load(int step, int row, int chunk) const {
    constexpr int kRowBytes = kTileDepth / 2;
    const int quarter = step % kStepsOfCodePanel;
    const int line = kForward ? row : quarter * kTileDepth + row % kTileDepth;
    const int byte = (kForward ? quarter : row / kTileDepth) * kRowBytes;
    return std::bit_cast<WeightChunk::Codes>(codes_.load_vec<kWeightChunk / 2>(
        begin(step / kStepsOfCodePanel) + line * kCodePitch + byte + chunk * (kWeightChunk / 2)));
  }

 private:
  __device__ static int begin(int panel) { return panel % kCodePanels * (kCodePanel * kCodePitch); }

  const TileWeight& weight_;
  Shared<std::uint8_t> codes_;
  Shared<Mbarrier> barriers_;
  std::int64_t column_;
  int steps_;
};

}  // namespace qlora::cuda
