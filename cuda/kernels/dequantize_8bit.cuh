// Blockwise 8-bit dequantization: map[code] * absmax, and + offset for double-quantized scales.
//
// Limiter: memory (3 bytes a bf16 value). Data path: 8 bytes of codes a thread -> 8 look-ups in the
// map in shared memory, at whatever bank a code's value lies (three to four lanes meet, on average,
// which leaves the look-up 1.8 times above what memory asks on an H100) -> 16 bytes stored.
#pragma once

#include <cstdint>

#include "device/global.cuh"
#include "device/shared.cuh"
#include "kernels/scales.cuh"
#include "kernels/tile.cuh"

namespace qlora::cuda {

template <class T>
struct Dequantize8bitArguments {
  std::int64_t n;
  int log2_blocksize;
  bool codes_aligned;                // to 8 bytes
  bool out_aligned;                  // to 16 bytes
  Global<const std::uint8_t> codes;  // [n]
  Global<const float> absmax;        // [n_blocks]
  Global<const float> offset;        // [1], added where kOffset
  Global<T> out;                     // [n]
};

// Without the sum where kOffset is false: adding 0 would turn -0 into 0.
template <class T, bool kSigned, bool kOffset>
__global__ void __launch_bounds__(kTileThreads)
    dequantize_8bit_kernel(const __grid_constant__ Dequantize8bitArguments<T> p) {
  __shared__ DynamicMap map;
  load_dynamic_map<kSigned>(map);
  sync_block();
  float offset = 0.0f;
  if constexpr (kOffset) offset = p.offset.load(0);

  const std::int64_t tiles = ceil_div(p.n, kTileValues);
  for (std::int64_t tile = block_index(); tile < tiles; tile += grid_blocks()) {
    const OctetPlace at(tile, p.n);
    if (at.count == 0) break;
    const OctetBytes codes = load_octet_bytes(p.codes, at, p.codes_aligned, 0);
    const float scale = p.absmax.load(at.first >> p.log2_blocksize);
    Octet octet;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      octet.value[i] = map.load(codes.get(i)) * scale;
      if constexpr (kOffset) octet.value[i] += offset;
    }
    store_octet(p.out, at, p.out_aligned, octet);
  }
}

}  // namespace qlora::cuda
