// The grid of the kernels that walk tiles of 4096 values (kernels/tile.cuh).
#pragma once

#include <bit>
#include <cstdint>

#include "device/launch.cuh"
#include "kernels/tile.cuh"

namespace qlora::cuda {

// Tables in shared memory are set up once for a block of threads, so no more blocks than are
// resident at a time: four of 512 threads fill a multiprocessor of 2048 (two, on sm_75, and three,
// on sm_86, are less; the rest then follows).
inline constexpr std::int64_t kBlocksPerMultiprocessor = 4;

template <class Kernel, class Arguments>
Status launch_tiles(Kernel* kernel, std::int64_t tiles, const Arguments& arguments, void* stream) {
  int processors = 0;
  if (const Status status = multiprocessors(&processors); !status.ok()) return status;
  const std::int64_t resident = processors * kBlocksPerMultiprocessor;
  return launch(
      kernel,
      {.grid = tiles < resident ? tiles : resident, .block = kTileThreads, .stream = stream},
      arguments);
}

inline std::int64_t n_tiles(std::int64_t n) { return ceil_div(n, kTileValues); }

inline int log2_of(std::int64_t power_of_two) {
  return std::countr_zero(static_cast<std::uint64_t>(power_of_two));
}

inline bool aligned_to(const void* p, std::uintptr_t bytes) {
  return reinterpret_cast<std::uintptr_t>(p) % bytes == 0;
}

}  // namespace qlora::cuda
