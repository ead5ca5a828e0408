// Blockwise 4-bit dequantization: value(code) * absmax, rounded once to fp32 and once to the
// output.
//
// Limiter: memory, of which stores are four fifths: 0.5 bytes in, 2 out for a bf16 value. At that
// rate an H100 can spend 22 instructions on a value; this takes about 6. A look-up a value is 5 to
// 6 times below what shared memory delivers.
//
// Data path: 4 bytes of codes a thread (128 contiguous a warp) -> 8 look-ups -> 16 bytes stored
// (512 contiguous a warp; fp32: two stores). Sixteen bytes of codes a thread would spread its
// stores over 64 bytes, half sectors each; loads are the small side here. The 16 values stand in
// shared memory once for each lane, so that a lane only ever reads its own bank. Scales are decoded
// here (scales.cuh): no launch of their own, no fp32 copy.
#pragma once

#include <bit>
#include <cstdint>

#include "device/global.cuh"
#include "device/shared.cuh"
#include "kernels/scales.cuh"
#include "kernels/tile.cuh"

namespace qlora::cuda {

template <class T>
struct Dequantize4bitArguments {
  std::int64_t n;
  int log2_blocksize;
  bool packed_aligned;                // to 4 bytes
  bool out_aligned;                   // to 16 bytes
  Global<const std::uint8_t> packed;  // [ceil(n/2)]
  DeviceScales scales;
  Global<T> out;     // [n]
  float values[16];  // by code
};

// Eight codes as four bytes; those past the count are 0.
__device__ inline std::uint32_t load_codes(Global<const std::uint8_t> packed, OctetPlace at,
                                           bool aligned) {
  if (aligned && at.whole_warp) {
    return std::bit_cast<std::uint32_t>(packed.load_vec<4>(at.first / 2));
  }
  std::uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < kOctet; i += 2) {
    if (i < at.count) codes |= std::uint32_t{packed.load((at.first + i) / 2)} << (4 * i);
  }
  return codes;
}

// Code i of eight.
__device__ inline int code_of(std::uint32_t codes, int i) {
  return static_cast<int>(codes >> (i % 2 == 0 ? 4 * i + 4 : 4 * i - 4) & 0xFu);
}

template <class T, bool kDouble>
__global__ void __launch_bounds__(kTileThreads)
    dequantize_4bit_kernel(const __grid_constant__ Dequantize4bitArguments<T> p) {
  __shared__ SharedArray<float, 16 * kWarpSize> values;  // [code][lane]
  __shared__ DynamicMap map;
  for (int i = thread_index(); i < 16 * kWarpSize; i += kTileThreads) {
    values.store(i, p.values[i / kWarpSize]);
  }
  if constexpr (kDouble) load_dynamic_map<true>(map);
  sync_block();

  const std::int64_t tiles = ceil_div(p.n, kTileValues);
  for (std::int64_t tile = block_index(); tile < tiles; tile += grid_blocks()) {
    const OctetPlace at(tile, p.n);
    if (at.count == 0) break;
    const std::uint32_t codes = load_codes(p.packed, at, p.packed_aligned);
    const float scale = block_scale<kDouble>(p.scales, map, at.first >> p.log2_blocksize);
    Octet octet;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      octet.value[i] = values.load(code_of(codes, i) * kWarpSize + lane_index()) * scale;
    }
    store_octet(p.out, at, p.out_aligned, octet);
  }
}

}  // namespace qlora::cuda
