// An optimizer's step with 8-bit blockwise state (Dettmers et al., 2022), by any rule, over many
// tensors in one launch.
//
// A block of 256 values is a warp's 32 octets: decoded, updated in fp32 and encoded again in
// registers, its absmax by shuffles. The parameter moves by the new moments as they are before
// encoding. Where a gradient, or its square, is not finite, the value keeps its parameter and its
// moments, or the block's absmax would carry it into 255 neighbours; a rule's last moment tells,
// which takes in the gradient with the highest power.
//
// Limiter: memory, 16 bytes a fp32 value under AdamW, 14 under Lion and SGD; the two look-ups of a
// moment (a map and a code table, 12.8 kB of shared memory, with bank conflicts) take about as long
// on an H100.
#pragma once

#include <bit>
#include <cstdint>
#include <utility>

#include "device/global.cuh"
#include "device/shared.cuh"
#include "kernels/any_type.cuh"
#include "kernels/block_absmax.cuh"
#include "kernels/codes_8bit.cuh"
#include "kernels/scales.cuh"
#include "kernels/tensor_list.cuh"
#include "kernels/tile.cuh"
#include "qlora_native/layout.h"
#include "qlora_native/params.h"

namespace qlora::cuda {

static_assert(kOptimizerBlocksize == kWarpValues);

template <int kMoments>
struct Step8bitDeviceTensor {
  std::int64_t n;
  AnyGlobal<void> param;                 // [n] in, out
  AnyGlobal<const void> grad;            // [n]
  Global<std::uint8_t> codes[kMoments];  // [n] each; in, out
  Global<float> absmax[kMoments];        // [ceil(n/256)] each; in, out
  bool aligned;                          // values to 16 bytes, codes to 8
};

template <class StepRule>
struct Step8bitArguments {
  using Rule = StepRule;
  using Tensor = Step8bitDeviceTensor<Rule::kMoments>;
  Rule rule;
  TensorList<Tensor> list;
};

// Whether x * (1 / absmax) loses nothing to the subnormals: second moments do get so small.
__device__ inline bool has_normal_inverse(float absmax) {
  return absmax >= 0x1p-120f && absmax <= 0x1p120f;
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

__device__ inline bool is_finite(float x) {
  return (std::bit_cast<std::uint32_t>(x) & 0x7F800000u) != 0x7F800000u;
}

// The codes of moment j and their values, in shared memory.
template <int kMoment>
struct MomentTables {
  static constexpr bool kSigned = is_signed_moment(kMoment);
  static constexpr std::uint8_t kZero = kSigned ? 127 : 0;
  static_assert(dynamic_map(kSigned)[kZero] == 0.0f);

  DynamicMap map;
  SharedCodes<kSigned> codes;

  // Wait at a barrier before they are read.
  __device__ void load() {
    load_dynamic_map<kSigned>(map);
    load_codes_table<kSigned>(codes);
  }

  __device__ OctetBytes encode(const Octet& moments, float absmax) {
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
};

// The tables that a rule's moments need and no others; each(body) is body<j>(tables of moment j).
template <class Moments>
struct StepTables;

template <int... kMoment>
struct StepTables<std::integer_sequence<int, kMoment...>> : MomentTables<kMoment>... {
  template <class Body>
  __device__ void each(const Body& body) {
    (body.template operator()<kMoment>(static_cast<MomentTables<kMoment>&>(*this)), ...);
  }
};

template <class Rule>
__global__ void __launch_bounds__(kTileThreads)
    step_8bit_kernel(const __grid_constant__ Step8bitArguments<Rule> p) {
  constexpr int kMoments = Rule::kMoments;
  __shared__ StepTables<std::make_integer_sequence<int, kMoments>> tables;
  const Rule& rule = p.rule;
  if (rule.gradient.skips()) return;
  tables.each([]<int j>(MomentTables<j>& of) { of.load(); });
  sync_block();

  const float grad_scale = rule.gradient.scale();
  for (std::int64_t tile = block_index(); tile < p.list.tiles; tile += grid_blocks()) {
    const TensorTile place = find_tile(p.list, tile);
    const Step8bitDeviceTensor<kMoments>& t = p.list.tensor[place.tensor];
    const OctetPlace at(place.tile, t.n);
    const std::int64_t block = at.first / kOptimizerBlocksize;
    const bool warp_has_values = block * kOptimizerBlocksize < t.n;
    if (!warp_has_values) continue;
    const Octet grad = load_octet(t.grad, t.n, at, t.aligned);
    Octet param = load_octet(t.param, t.n, at, t.aligned);
    OctetBytes codes[kMoments];
    float absmax[kMoments];
    tables.each([&]<int j>(MomentTables<j>& of) {
      absmax[j] = t.absmax[j].load(block);
      codes[j] = load_octet_bytes(t.codes[j], at, t.aligned, of.kZero);
    });
    Octet octets[kMoments];
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      float before[kMoments];
      float after[kMoments];
      tables.each([&]<int j>(MomentTables<j>& of) {
        before[j] = of.map.load(codes[j].get(i)) * absmax[j];
        after[j] = before[j];
      });
      const float g = rule.gradient.take(grad.value[i], grad_scale);
      const float moved = rule.step(param.value[i], g, after);
      const bool finite = is_finite(after[kMoments - 1]);
      param.value[i] = finite ? moved : param.value[i];
#pragma unroll
      for (int j = 0; j < kMoments; ++j) octets[j].value[i] = finite ? after[j] : before[j];
    }
    store_octet(t.param, t.n, at, t.aligned, param);
    sync_warp();  // all lanes have loaded the old absmax
    tables.each([&]<int j>(MomentTables<j>& of) {
      const float largest = warp_absmax(octets[j]);
      store_octet_bytes(t.codes[j], at, t.aligned, of.encode(octets[j], largest));
      if (lane_index() == 0) t.absmax[j].store(block, largest);
    });
  }
}

}  // namespace qlora::cuda
