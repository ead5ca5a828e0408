// AdamW with 32-bit state, over many tensors in one launch.
//
// Limiter: memory, 28 bytes a fp32 value and its gradient (four reads, three writes) against some
// 15 instructions. A thread moves an octet of each of the four arrays: up to 128 bytes in flight.
#pragma once

#include <cstdint>

#include "device/global.cuh"
#include "kernels/adamw_update.cuh"
#include "kernels/any_type.cuh"
#include "kernels/tensor_list.cuh"
#include "kernels/tile.cuh"

namespace qlora::cuda {

struct AdamwDeviceTensor {
  std::int64_t n;
  AnyGlobal<void> param;       // [n] in, out
  AnyGlobal<const void> grad;  // [n]
  Global<float> exp_avg;       // [n] in, out
  Global<float> exp_avg_sq;    // [n] in, out
  bool aligned;                // all four, to 16 bytes
};

struct AdamwArguments {
  AdamwFactors factors;
  TensorList<AdamwDeviceTensor> list;
};

__global__ void __launch_bounds__(kTileThreads)
    adamw_kernel(const __grid_constant__ AdamwArguments p) {
  const AdamwFactors& f = p.factors;
  if (is_skipped(f)) return;
  const float grad_scale = grad_scale_of(f);
  for (std::int64_t tile = block_index(); tile < p.list.tiles; tile += grid_blocks()) {
    const TensorTile place = find_tile(p.list, tile);
    const AdamwDeviceTensor& t = p.list.tensor[place.tensor];
    const OctetPlace at(place.tile, t.n);
    if (at.count == 0) continue;
    const Octet grad = load_octet(t.grad, t.n, at, t.aligned);
    Octet param = load_octet(t.param, t.n, at, t.aligned);
    Octet m = load_octet(t.exp_avg, at, t.aligned);
    Octet v = load_octet(t.exp_avg_sq, at, t.aligned);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      const float g = adamw_gradient(f, grad.value[i], grad_scale);
      const Moments moments = adamw_moments(f, {m.value[i], v.value[i]}, g);
      param.value[i] = adamw_param(f, param.value[i], moments);
      m.value[i] = moments.first;
      v.value[i] = moments.second;
    }
    store_octet(t.exp_avg, at, t.aligned, m);
    store_octet(t.exp_avg_sq, at, t.aligned, v);
    store_octet(t.param, t.n, at, t.aligned, param);
  }
}

}  // namespace qlora::cuda
