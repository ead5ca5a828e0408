// Where a thread stands, and the barriers it may wait at.
//
// Kernels are one-dimensional: a grid of blocks, a block of threads.
#pragma once

#include <cstdint>

namespace qlora::cuda {

inline constexpr int kWarpSize = 32;

__device__ inline int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ inline int block_threads() { return static_cast<int>(blockDim.x); }
__device__ inline int lane_index() { return thread_index() % kWarpSize; }
__device__ inline int warp_index() { return thread_index() / kWarpSize; }
__device__ inline std::int64_t block_index() { return blockIdx.x; }
__device__ inline std::int64_t grid_blocks() { return gridDim.x; }

// bar.sync 0: every thread of the block, all at the same place in the source.
__device__ inline void sync_block() { __syncthreads(); }

// bar.warp.sync, and shared memory written before it is seen after it.
__device__ inline void sync_warp() { __syncwarp(); }

}  // namespace qlora::cuda
