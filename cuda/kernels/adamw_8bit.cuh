// AdamW with 8-bit blockwise state (Dettmers et al., 2022), over many tensors in one launch.
//
// A block of 256 values is a warp's 32 octets: decoded, updated in fp32 and encoded again in
// registers, its two absmax by shuffles. The parameter moves by the new moments as they are before
// encoding. Where a gradient, or its square, is not finite, the value keeps its parameter and its
// moments, or the block's absmax would carry it into 255 neighbours.
//
// Limiter: memory, 16 bytes a fp32 value; the four look-ups of a value (two maps, two code tables,
// 25.6 kB of shared memory with bank conflicts) take about as long on an H100.
#pragma once

#include <cstdint>

#include "device/global.cuh"
#include "device/shared.cuh"
#include "kernels/adamw_update.cuh"
#include "kernels/any_type.cuh"
#include "kernels/block_absmax.cuh"
#include "kernels/codes_8bit.cuh"
#include "kernels/scales.cuh"
#include "kernels/tensor_list.cuh"
#include "kernels/tile.cuh"
#include "qlora_native/layout.h"

namespace qlora::cuda {

static_assert(kOptimizerBlocksize == kWarpValues);

// The codes of zero.
inline constexpr std::uint8_t kSignedZero = 127;
inline constexpr std::uint8_t kUnsignedZero = 0;
static_assert(kDynamicMapSigned[kSignedZero] == 0.0f && kDynamicMapUnsigned[kUnsignedZero] == 0.0f);

struct Adamw8bitDeviceTensor {
  std::int64_t n;
  AnyGlobal<void> param;            // [n] in, out
  AnyGlobal<const void> grad;       // [n]
  Global<std::uint8_t> exp_avg;     // [n] in, out
  Global<std::uint8_t> exp_avg_sq;  // [n] in, out
  Global<float> exp_avg_absmax;     // [ceil(n/256)] in, out
  Global<float> exp_avg_sq_absmax;  // [ceil(n/256)] in, out
  bool aligned;                     // values to 16 bytes, codes to 8
};

struct Adamw8bitArguments {
  AdamwFactors factors;
  TensorList<Adamw8bitDeviceTensor> list;
};

// Whether x * (1 / absmax) loses nothing to the subnormals: second moments do get so small.
__device__ inline bool has_normal_inverse(float absmax) {
  return absmax >= 0x1p-120f && absmax <= 0x1p120f;
}

template <bool kSigned>
__device__ OctetBytes encode_moments(SharedCodes<kSigned>& codes, const Octet& moments,
                                     float absmax) {
  const bool by_inverse = has_normal_inverse(absmax);
  const float inverse = 1.0f / absmax;
  const float divisor = absmax == 0.0f ? 1.0f : absmax;  // zeros get the code of zero
  OctetBytes bytes{};
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    const float x = moments.value[i];
    bytes.set(i, encode_8bit<kSigned>(codes, by_inverse ? x * inverse : x / divisor));
  }
  return bytes;
}

__device__ inline float warp_absmax(const Octet& moments) {
  std::uint32_t largest = 0;
#pragma unroll
  for (const float value : moments.value) largest = larger(largest, magnitude_bits(value));
  for (int step = 1; step < kWarpSize; step *= 2) {
    largest = larger(largest, shuffle_xor(largest, step));
  }
  return std::bit_cast<float>(largest);
}

__global__ void __launch_bounds__(kTileThreads)
    adamw_8bit_kernel(const __grid_constant__ Adamw8bitArguments p) {
  __shared__ DynamicMap signed_map;
  __shared__ DynamicMap unsigned_map;
  __shared__ SharedCodes<true> signed_codes;
  __shared__ SharedCodes<false> unsigned_codes;
  const AdamwFactors& f = p.factors;
  if (is_skipped(f)) return;
  load_dynamic_map<true>(signed_map);
  load_dynamic_map<false>(unsigned_map);
  load_codes_table<true>(signed_codes);
  load_codes_table<false>(unsigned_codes);
  sync_block();

  const float grad_scale = grad_scale_of(f);
  for (std::int64_t tile = block_index(); tile < p.list.tiles; tile += grid_blocks()) {
    const TensorTile place = find_tile(p.list, tile);
    const Adamw8bitDeviceTensor& t = p.list.tensor[place.tensor];
    const OctetPlace at(place.tile, t.n);
    const std::int64_t block = at.first / kOptimizerBlocksize;
    const bool warp_has_values = block * kOptimizerBlocksize < t.n;
    if (!warp_has_values) continue;
    const float m_absmax = t.exp_avg_absmax.load(block);
    const float v_absmax = t.exp_avg_sq_absmax.load(block);
    const Octet grad = load_octet(t.grad, t.n, at, t.aligned);
    Octet param = load_octet(t.param, t.n, at, t.aligned);
    const OctetBytes m_codes = load_octet_bytes(t.exp_avg, at, t.aligned, kSignedZero);
    const OctetBytes v_codes = load_octet_bytes(t.exp_avg_sq, at, t.aligned, kUnsignedZero);
    Octet m, v;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      const float g = adamw_gradient(f, grad.value[i], grad_scale);
      const Moments old{signed_map.load(m_codes.get(i)) * m_absmax,
                        unsigned_map.load(v_codes.get(i)) * v_absmax};
      const Moments moved = adamw_moments(f, old, g);
      const bool finite = is_finite(moved.second);
      m.value[i] = finite ? moved.first : old.first;
      v.value[i] = finite ? moved.second : old.second;
      if (finite) param.value[i] = adamw_param(f, param.value[i], {m.value[i], v.value[i]});
    }
    store_octet(t.param, t.n, at, t.aligned, param);

    const float new_m_absmax = warp_absmax(m);
    const float new_v_absmax = warp_absmax(v);
    store_octet_bytes(t.exp_avg, at, t.aligned,
                      encode_moments<true>(signed_codes, m, new_m_absmax));
    store_octet_bytes(t.exp_avg_sq, at, t.aligned,
                      encode_moments<false>(unsigned_codes, v, new_v_absmax));
    if (lane_index() == 0) {
      t.exp_avg_absmax.store(block, new_m_absmax);
      t.exp_avg_sq_absmax.store(block, new_v_absmax);
    }
  }
}

}  // namespace qlora::cuda
