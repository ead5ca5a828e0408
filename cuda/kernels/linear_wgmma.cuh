// Products with a 4-bit weight W [N, K] for many rows, on Hopper's warpgroup products (sm_90a):
//
//   y [M, N]       = x W^T     (+ left right^T) (+ bias)      forward
//   grad_x [M, K]  = grad_out W (+ drop'(left right^T))       its input gradient
//
// Limiter: shared memory and the tensor cores, nearly alike. Clocks of a multiprocessor for a step
// of 64 depths of a tile of 128 x 256, counted, not measured:
//
//   tensor cores    4096 flops a clock                                        1024
//   shared memory   operands that wgmma reads: 40 kB for each 64 rows          640
//   128 bytes       W written: 256; x written: 128; codes written and read: 128
//   a clock         together                                                  1152
//   issue           of the producer's warp, on its scheduler            690 to 815
//
// (A dense kernel of this tile lacks the codes alone: 1024.) From memory and the second-level cache
// a tile takes 8 kB of codes and 16 kB of x a step, 24 bytes a clock.
//
// Data path: three warpgroups. One produces: x by cp.async (16 bytes a thread, swizzled as it
// lands), W by weight_producer.cuh, both into a ring of three stages, and gives most of its
// registers to the others. Two consume (warpgroup_tile.cuh): 64 rows of the tile each, both
// operands read from the ring as they lie. Nobody waits at a barrier of the block: mbarriers say
// full and empty (operand_ring.cuh). LoRA's operands are more steps of the depth, before the
// others; the mask comes between. The gradient's right operand is W as it lies, [n][k]: its depth
// lies across the rows.
//
// A thread finds its data by panel.cuh (x), weight_producer.cuh (W; both tell why no access has a
// bank conflict), wgmma.cuh (sums) and tile_epilogue.cuh (the way out).
//
// Registers: 168 a thread at the launch; then 104 for the producer, 200 for those with 128 sums.
// Shared memory: 216 kB and 1.1 kB, so one block a multiprocessor.
#pragma once

#include <cstdint>

#include "device/async_copy.cuh"
#include "device/fence.cuh"
#include "device/mbarrier.cuh"
#include "device/warpgroup.cuh"
#include "kernels/code_panels.cuh"
#include "kernels/operand_ring.cuh"
#include "kernels/panel.cuh"
#include "kernels/tile_epilogue.cuh"
#include "kernels/tile_product.cuh"
#include "kernels/warpgroup_tile.cuh"
#include "kernels/weight_producer.cuh"
#include "kernels/wgmma_shape.h"

namespace qlora::cuda {

// Where a block's tile begins, and the steps it takes.
template <class T>
struct WgmmaTile {
  std::int64_t row, column;
  int lora_steps, steps;

  __device__ explicit WgmmaTile(const TileProduct<T>& p)
      : row(block_index() % p.tiles_down * kWgmmaTileRows),
        column(block_index() / p.tiles_down * kWgmmaTileColumns),
        lora_steps(static_cast<int>(ceil_div(p.left.columns, kTileDepth))),
        steps(static_cast<int>(ceil_div(p.x.columns, kTileDepth))) {}
};

template <DepthOfRight kDepth, class T>
__device__ void produce(const TileProduct<T>& p, const OperandRing<T>& ring, DynamicMap& map) {
  const WgmmaTile<T> tile(p);
  RingPlace place;
  const CodePanels<kDepth> codes(p.weight, ring.barriers, tile.column, tile.steps);
  WeightProducer<T, kDepth> weights(p.weight, codes, ring.weights, map, tile.column);
  // 64 depths of x from `depth` on, and what write_right(base) writes meanwhile.
  const auto fill = [&](const RowMajor<T>& x, std::int64_t depth, auto&& write_right) {
    place.wait_empty(ring.barriers);
    copy_panel<kWgmmaTileRows, kWgmmaProducerThreads>(ring.x, place.stage * ring.kX, x, tile.row,
                                                      depth);
    commit_copies();
    write_right(place.stage * ring.kWeights);
    wait_copies<0>();
    fence_async_proxy();
    arrive(ring.barriers, kFullBarrier + place.stage);
    place.next();
  };
#pragma unroll 1
  for (int step = 0; step < tile.lora_steps; ++step) {
    const std::int64_t depth = std::int64_t{step} * kTileDepth;
    fill(p.left, depth, [&](int base) {
      copy_panel<kWgmmaTileColumns, kWgmmaProducerThreads>(ring.weights, base, p.right, tile.column,
                                                           depth);
      commit_copies();
    });
  }
#pragma unroll 1
  for (int step = 0; step < tile.steps; ++step) {
    fill(p.x, std::int64_t{step} * kTileDepth, [&](int base) { weights.write(step, base); });
  }
}

template <DepthOfRight kDepth, class T>
__device__ void consume(const TileProduct<T>& p, const OperandRing<T>& ring) {
  const WgmmaTile<T> at(p);
  RingPlace place;
  const CodePanels<kDepth> codes(p.weight, ring.barriers, at.column, at.steps);
#pragma unroll 1
  for (int panel = 0; panel < kCodePanels; ++panel) codes.fetch(panel);
  WarpgroupTile tile;
  tile.clear();
  if (at.lora_steps > 0) {
    tile.multiply_steps<DepthOfRight::along_rows>(ring, place, at.lora_steps, [](int) {});
    if (p.dropout.threshold > 0) apply_dropout(tile, p.dropout, at.row, at.column);
  }
  tile.multiply_steps<kDepth>(ring, place, at.steps, [&](int step) {
    // The last step of a panel is full: its codes have been read.
    if ((step + 1) % kStepsOfCodePanel == 0) codes.fetch(step / kStepsOfCodePanel + kCodePanels);
  });
  store_tile(tile, p.out, at.row, at.column);
}

// The launcher refuses cards for which the body is left out.
template <class T, DepthOfRight kDepth>
__global__ void __launch_bounds__(kWgmmaThreads, 1)
    linear_wgmma_kernel(const __grid_constant__ TileProduct<T> p) {
  if constexpr (kHasWarpgroups) {
    __shared__ DynamicMap map;
    __shared__ SharedArray<Mbarrier, kWgmmaBarriers> barriers;
    const OperandRing<T> ring(barriers.view());
    if (thread_index() == 0) {
      for (int i = 0; i < kWgmmaStages; ++i) {
        init_mbarrier(ring.barriers, kFullBarrier + i, kWgmmaProducerThreads);
        init_mbarrier(ring.barriers, kEmptyBarrier + i, kWgmmaConsumers * 4);
      }
      for (int i = 0; i < kCodePanels; ++i) {
        init_mbarrier(ring.barriers, kCodesBarrier + i, kWgmmaConsumers * kWarpgroupThreads);
      }
      fence_async_proxy();
    }
    if (p.weight.double_quantized) load_dynamic_map<true>(map);
    sync_block();
    if (warpgroup_index() == 0) {
      give_registers<kProducerRegisters>();
      produce<kDepth>(p, ring, map);
    } else {
      take_registers<kConsumerRegisters>();
      consume<kDepth>(p, ring);
    }
  }
}

}  // namespace qlora::cuda
