// The scale of a block, plain or double-quantized.
//
//   absmax[b] = map[absmax_q8[b]] * nested_absmax[b / 256] + nested_offset
//
// The product is rounded before the sum, as bitsandbytes does it; the build forbids a contraction.
#pragma once

#include <cstdint>

#include "qlora_native/dynamic_map.h"
#include "qlora_native/layout.h"
#include "qlora_native/params.h"

namespace qlora::cpu {

template <class V>
float block_scale(const Scales& scales, std::int64_t block) {
  if (!scales.double_quantized()) return scales.absmax[block];
  const float value = kDynamicMapSigned[scales.absmax_q8[block]];
  return value * scales.nested_absmax[block / kNestedBlocksize] + *scales.nested_offset;
}

}  // namespace qlora::cpu
