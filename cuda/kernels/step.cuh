// An optimizer's step with 32-bit state, by any rule, over many tensors in one launch.
//
// Limiter: memory. A fp32 value and its gradient are 28 bytes under AdamW (four reads, three
// writes), 20 under Lion and SGD, against some 15 instructions. A thread moves an octet of each
// array: up to 128 bytes in flight.
#pragma once

#include <cstdint>

#include "device/global.cuh"
#include "kernels/any_type.cuh"
#include "kernels/tensor_list.cuh"
#include "kernels/tile.cuh"

namespace qlora::cuda {

template <int kMoments>
struct StepDeviceTensor {
  std::int64_t n;
  AnyGlobal<void> param;            // [n] in, out
  AnyGlobal<const void> grad;       // [n]
  Global<float> moments[kMoments];  // [n] each; in, out
  bool aligned;                     // all of them, to 16 bytes
};

template <class StepRule>
struct StepArguments {
  using Rule = StepRule;
  using Tensor = StepDeviceTensor<Rule::kMoments>;
  Rule rule;
  TensorList<Tensor> list;
};

template <class Rule>
__global__ void __launch_bounds__(kTileThreads)
    step_kernel(const __grid_constant__ StepArguments<Rule> p) {
  constexpr int kMoments = Rule::kMoments;
  const Rule& rule = p.rule;
  if (rule.gradient.skips()) return;
  const float grad_scale = rule.gradient.scale();
  for (std::int64_t tile = block_index(); tile < p.list.tiles; tile += grid_blocks()) {
    const TensorTile place = find_tile(p.list, tile);
    const StepDeviceTensor<kMoments>& t = p.list.tensor[place.tensor];
    const OctetPlace at(place.tile, t.n);
    if (at.count == 0) continue;
    const Octet grad = load_octet(t.grad, t.n, at, t.aligned);
    Octet param = load_octet(t.param, t.n, at, t.aligned);
    Octet octets[kMoments];
#pragma unroll
    for (int j = 0; j < kMoments; ++j) octets[j] = load_octet(t.moments[j], at, t.aligned);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      float moments[kMoments];
#pragma unroll
      for (int j = 0; j < kMoments; ++j) moments[j] = octets[j].value[i];
      const float g = rule.gradient.take(grad.value[i], grad_scale);
      param.value[i] = rule.step(param.value[i], g, moments);
#pragma unroll
      for (int j = 0; j < kMoments; ++j) octets[j].value[i] = moments[j];
    }
#pragma unroll
    for (int j = 0; j < kMoments; ++j) store_octet(t.moments[j], at, t.aligned, octets[j]);
    store_octet(t.param, t.n, at, t.aligned, param);
  }
}

}  // namespace qlora::cuda
