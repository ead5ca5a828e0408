// Twin of cuda/device/thread.cuh: asks the emulated machine.
#pragma once

#include <cmath>
#include <cstdint>
#include <source_location>

#include "machine.h"

// CUDA's qualifiers. Blocks of threads run one after another, so that a function's shared memory is
// a static of it; that it starts each block with nothing in it is watched by its cells
// (shared.cuh).
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

namespace qlora::cuda {

inline constexpr int kWarpSize = emulation::kWarpSize;

using Where = std::source_location;

inline emulation::Machine& machine() { return emulation::Machine::instance(); }

inline int thread_index() { return machine().thread().index; }
inline int block_threads() { return machine().launch().block; }
inline int lane_index() { return thread_index() % kWarpSize; }
inline int warp_index() { return thread_index() / kWarpSize; }
inline std::int64_t block_index() { return machine().block_index(); }
inline std::int64_t grid_blocks() { return machine().launch().grid; }

inline void sync_block(const Where& where = Where::current()) { machine().sync_block(where); }
inline void sync_warp(const Where& where = Where::current()) { machine().sync_warp(where); }

}  // namespace qlora::cuda
