// The ring through which one warpgroup hands operands to those that multiply them
// (linear_wgmma.cuh).
//
// A stage has 64 depths of both operands, as swizzled rows of 128 bytes (panel.cuh; what wgmma
// calls the swizzle of 128 bytes). An mbarrier of each stage says that it is full, another that it
// is empty again: 128 threads of the producer arrive at the first, a lane of each consuming warp at
// the second.
#pragma once

#include <cstdint>

#include "device/mbarrier.cuh"
#include "device/shared.cuh"
#include "kernels/panel.cuh"
#include "kernels/wgmma_shape.h"

namespace qlora::cuda {

// Numbers of a block's mbarriers.
inline constexpr int kFullBarrier = 0;
inline constexpr int kEmptyBarrier = kFullBarrier + kWgmmaStages;
inline constexpr int kCodesBarrier = kEmptyBarrier + kWgmmaStages;  // code_panels.cuh
inline constexpr int kWgmmaBarriers = kCodesBarrier + kCodePanels;

template <class T>
struct OperandRing {
  static constexpr int kX = kWgmmaTileRows * kPanelColumns;  // elements of a stage
  static constexpr int kWeights = kWgmmaTileColumns * kPanelColumns;

  Shared<T> x;        // [stages][128][64]
  Shared<T> weights;  // [stages][256][64], or [stages][4][64][64]
  Shared<Mbarrier> barriers;

  __device__ explicit OperandRing(Shared<Mbarrier> barriers)
      : x(swizzled_shared<T>(0, kWgmmaStages * kX)),
        weights(swizzled_shared<T>(kWgmmaXBytes, kWgmmaStages * kWeights)),
        barriers(barriers) {}
};

// Where a thread stands in the ring: a step of the product takes a stage.
struct RingPlace {
  int stage = 0;
  int turn = 0;  // round the ring, modulo 2

  __device__ void next() {
    if (++stage < kWgmmaStages) return;
    stage = 0;
    turn ^= 1;
  }
  // The stage is empty (before its first turn it always is), or full.
  __device__ void wait_empty(Shared<Mbarrier> barriers) const {
    wait_phase(barriers, kEmptyBarrier + stage, turn ^ 1);
  }
  __device__ void wait_full(Shared<Mbarrier> barriers) const {
    wait_phase(barriers, kFullBarrier + stage, turn);
  }
};

}  // namespace qlora::cuda
