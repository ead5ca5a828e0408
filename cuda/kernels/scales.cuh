// The scale of a block, plain or double-quantized, decoded where it is needed.
//
//   absmax[b] = map[absmax_q8[b]] * nested_absmax[b / 256] + nested_offset
//
// The product is rounded before the sum (the build forbids a contraction), as on the CPU. The map
// is 1 kB in shared memory: lanes of one block read one address, and 256 values of a warp hold at
// most 8 blocks, so that a look-up, one for eight values, meets few bank conflicts.
#pragma once

#include <cstdint>

#include "device/global.cuh"
#include "device/shared.cuh"
#include "device/thread.cuh"
#include "kernels/tables.cuh"
#include "qlora_native/layout.h"
#include "qlora_native/params.h"

namespace qlora::cuda {

struct DeviceScales {
  Global<const float> absmax{};            // [n_blocks], plain
  Global<const std::uint8_t> absmax_q8{};  // [n_blocks], double-quantized; and the other two:
  Global<const float> nested_absmax{};     // [ceil(n_blocks/256)]
  Global<const float> nested_offset{};     // [1]
};

inline DeviceScales device_scales(const Scales& scales, std::int64_t n_blocks) {
  if (!scales.double_quantized()) return {.absmax = {scales.absmax, n_blocks}};
  return {.absmax_q8 = {scales.absmax_q8, n_blocks},
          .nested_absmax = {scales.nested_absmax, ceil_div(n_blocks, kNestedBlocksize)},
          .nested_offset = {scales.nested_offset, 1}};
}

using DynamicMap = SharedArray<float, 256>;

// The map in shared memory; wait at a barrier before it is read.
template <bool kSigned>
__device__ void load_dynamic_map(DynamicMap& map) {
  const Global<const float> values = dynamic_map_values<kSigned>();
  for (int i = thread_index(); i < 256; i += block_threads()) map.store(i, values.load(i));
}

template <bool kDouble>
__device__ float block_scale(const DeviceScales& scales, DynamicMap& map, std::int64_t block) {
  if constexpr (kDouble) {
    const float value = map.load(scales.absmax_q8.load(block));
    const float scaled = value * scales.nested_absmax.load(block / kNestedBlocksize);
    return scaled + scales.nested_offset.load(0);
  } else {
    return scales.absmax.load(block);
  }
}

}  // namespace qlora::cuda
