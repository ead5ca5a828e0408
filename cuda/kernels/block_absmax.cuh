// The largest magnitude of each quantization block of a tile, by every thread of the block.
//
// Magnitudes are compared as integers: the bits of floats without their sign ascend with them, and
// NaN stands above infinity, so a block with a NaN gets NaN. A block of up to 256 values lies in
// one warp: shuffles. A larger one spans 2 to 16 whole warps, which leave their maxima in shared
// memory; two sets of them take turns, so that one barrier a tile is enough: a set is written again
// only after the barrier that follows its last reads.
#pragma once

#include <bit>
#include <cstdint>

#include "device/shared.cuh"
#include "device/thread.cuh"
#include "device/warp.cuh"
#include "kernels/tile.cuh"

namespace qlora::cuda {

inline constexpr int kWarpValues = kWarpSize * kOctet;  // 256

using WarpMaxima = SharedArray<std::uint32_t, 2 * kTileWarps>;

__device__ inline std::uint32_t magnitude_bits(float x) {
  return std::bit_cast<std::uint32_t>(x) & 0x7FFFFFFFu;
}

__device__ inline std::uint32_t larger(std::uint32_t a, std::uint32_t b) { return a > b ? a : b; }

// `largest` is this thread's own. kWide: the blocksize is above 256; `turn` alternates 0, 1.
template <bool kWide>
__device__ float block_absmax(std::uint32_t largest, int log2_blocksize, WarpMaxima& maxima,
                              int turn) {
  const int lanes = kWide ? kWarpSize : (1 << log2_blocksize) / kOctet;
  for (int step = 1; step < lanes; step *= 2) {
    largest = larger(largest, shuffle_xor(largest, step));
  }
  if constexpr (kWide) {
    const int set = turn * kTileWarps;
    if (lane_index() == 0) maxima.store(set + warp_index(), largest);
    sync_block();
    const int warps = (1 << log2_blocksize) / kWarpValues;
    const int first = warp_index() / warps * warps;
    for (int i = 0; i < warps; ++i) largest = larger(largest, maxima.load(set + first + i));
  }
  return std::bit_cast<float>(largest);
}

}  // namespace qlora::cuda
