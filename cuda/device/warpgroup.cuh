// Warpgroups: four consecutive warps that multiply together (wgmma.cuh); how the warps of a block
// share its registers out (sm_90a), and barriers of some of them.
#pragma once

#include "device/thread.cuh"

namespace qlora::cuda {

inline constexpr int kWarpgroupThreads = 4 * kWarpSize;

// Whether the code being compiled is for the one architecture that has wgmma and setmaxnreg. A
// kernel that is not meant for others leaves its body out there.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
inline constexpr bool kHasWarpgroups = true;
#else
inline constexpr bool kHasWarpgroups = false;
#endif

// For the host: whether this build has code for it (cmake/Cuda.cmake), and which card takes that.
#if defined(QLORA_CUDA_SM90A)
inline constexpr bool kBuiltForWarpgroups = true;
#else
inline constexpr bool kBuiltForWarpgroups = false;
#endif
inline constexpr int kWarpgroupArchitecture = 90;

// The same in all lanes of a warp, as the compiler can see.
__device__ inline int warpgroup_index() {
  return __shfl_sync(0xFFFFFFFFu, thread_index() / kWarpgroupThreads, 0);
}

// setmaxnreg: each thread of this warpgroup has so many registers from here on. What some give,
// others may take; who takes waits until there are enough.
template <int kRegisters>
__device__ void give_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(kRegisters));
}
template <int kRegisters>
__device__ void take_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(kRegisters));
}

// bar.sync id, threads: waits until so many threads, of whole warps, have come to this barrier.
// Number 0 is the block's.
__device__ inline void sync_named(int id, int threads) {
  asm volatile("bar.sync %0, %1;" : : "r"(id), "r"(threads) : "memory");
}

}  // namespace qlora::cuda
