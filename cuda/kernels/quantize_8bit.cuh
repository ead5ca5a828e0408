// Blockwise 8-bit quantization to the dynamic maps; of scales less their mean, it is the second
// half of double quantization.
//
// `nearest` is tables.cuh's. `bitsandbytes_cpu` first moves x to that package's table of 65,536
// steps over [-1, 1] (cpp/cpu/quantize_8bit_inl.h has both, and the treatment of NaN and tiny
// blocks, which this follows to the bit).
//
// Limiter: memory for fp32 (5 bytes a value); for 16-bit inputs the look-up (codes_8bit.cuh), whose
// lanes meet at the banks, comes within a factor of two of it.
//
// Data path: a thread's octet -> registers -> shuffles (block_absmax.cuh) -> 8 look-ups -> 8 bytes,
// 256 contiguous bytes of codes a warp.
#pragma once

#include <cstdint>

#include "device/global.cuh"
#include "device/shared.cuh"
#include "kernels/block_absmax.cuh"
#include "kernels/codes_8bit.cuh"
#include "kernels/tile.cuh"
#include "qlora_native/params.h"

namespace qlora::cuda {

template <class T>
struct Quantize8bitArguments {
  std::int64_t n;
  int log2_blocksize;
  bool x_aligned;      // to 16 bytes
  bool codes_aligned;  // to 8 bytes
  bool has_offset;
  float smallest_divisor;
  Global<const T> x;           // [n]
  Global<const float> offset;  // [1], subtracted from x first, if any
  Global<std::uint8_t> codes;  // [n]
  Global<float> absmax;        // [n_blocks]
};

// The value of x's step in bitsandbytes' table; NaN counts as -1.
__device__ inline float to_table_step(float x) {
  x = x > -1.0f ? x : -1.0f;
  x = x < 1.0f ? x : 1.0f;
  const float unit = (x + 1.0f) * 0.5f;
  const auto step = static_cast<float>(static_cast<int>(unit * 65535.0f + 0.5f));
  return 2.0f * step / 65535.0f - 1.0f;
}

template <class T, bool kSigned, CodeRounding kRounding, bool kWide>
__global__ void __launch_bounds__(kTileThreads)
    quantize_8bit_kernel(const __grid_constant__ Quantize8bitArguments<T> p) {
  constexpr bool kNearest = kRounding == CodeRounding::nearest;
  __shared__ SharedCodes<kSigned> table;
  __shared__ WarpMaxima maxima;
  load_codes_table<kSigned>(table);
  sync_block();
  const float offset = p.has_offset ? p.offset.load(0) : 0.0f;

  const std::int64_t tiles = ceil_div(p.n, kTileValues);
  int turn = 0;
  for (std::int64_t tile = block_index(); tile < tiles; tile += grid_blocks(), turn ^= 1) {
    const OctetPlace at(tile, p.n);
    Octet x = load_octet(p.x, at, p.x_aligned);
    std::uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      x.value[i] -= offset;
      const bool counts = i < at.count && (kNearest || x.value[i] == x.value[i]);
      if (counts) largest = larger(largest, magnitude_bits(x.value[i]));
    }
    const float absmax = block_absmax<kWide>(largest, p.log2_blocksize, maxima, turn);

    const std::int64_t block = at.first >> p.log2_blocksize;
    const bool is_first = at.first == block << p.log2_blocksize;
    if (is_first && at.count > 0) p.absmax.store(block, absmax);

    const float inverse = 1.0f / (absmax < p.smallest_divisor ? p.smallest_divisor : absmax);
    OctetBytes codes{};
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      float normed = x.value[i] * inverse;
      if constexpr (!kNearest) normed = to_table_step(normed);
      codes.set(i, encode_8bit<kSigned>(table, normed));
    }
    store_octet_bytes(p.codes, at, p.codes_aligned, codes);
  }
}

}  // namespace qlora::cuda
