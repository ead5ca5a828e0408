// The scale of a block, plain or double-quantized.
//
//   absmax[b] = map[absmax_q8[b]] * nested_absmax[b / 256] + nested_offset
//
// The product is rounded before the sum, as bitsandbytes does it; the build forbids a contraction.
#pragma once

#include <cstdint>
#include <cstring>

#include "qlora_native/dynamic_map.h"
#include "qlora_native/layout.h"
#include "qlora_native/params.h"

namespace qlora::cpu {

template <class V>
[[gnu::always_inline]] inline float block_scale(const Scales& scales, std::int64_t block) {
  if (!scales.double_quantized()) return scales.absmax[block];
  const float value = kDynamicMapSigned[scales.absmax_q8[block]];
  return value * scales.nested_absmax[block / kNestedBlocksize] + *scales.nested_offset;
}

// out[i] = map[codes[i]], code by code: two loads, and a store at a time, through integer
// registers. Compilers turn this into gathers or into extracts and inserts, which take 1.5 to 3
// times as long on Zen 4 and, unlike this, do so on the vector units that the caller needs.
template <class V>
[[gnu::optimize("no-tree-vectorize")]] void read_map(const float* map, const std::uint8_t* codes,
                                                     std::int64_t n, float* out) {
#pragma GCC unroll 8
  for (std::int64_t i = 0; i < n; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, &map[codes[i]], sizeof bits);
    std::memcpy(out + i, &bits, sizeof bits);
  }
}

// out[i] holds the map's value of block first + i and becomes that block's scale.
template <class V>
void apply_nested_scales(const Scales& scales, std::int64_t first, std::int64_t n, float* out) {
  const auto offset = V::set1(*scales.nested_offset);
  for (std::int64_t i = 0; i < n;) {
    const std::int64_t nested_block = (first + i) / kNestedBlocksize;
    const std::int64_t nested_end = (nested_block + 1) * kNestedBlocksize - first;
    const std::int64_t stop = nested_end < n ? nested_end : n;
    const auto nested_absmax = V::set1(scales.nested_absmax[nested_block]);
    for (; i + V::kWidth <= stop; i += V::kWidth) {
      V::store(out + i, V::add(V::mul(V::load(out + i), nested_absmax), offset));
    }
    if (i < stop) {
      const auto rest = V::add(V::mul(V::load_n(out + i, stop - i), nested_absmax), offset);
      V::store_n(out + i, rest, stop - i);
      i = stop;
    }
  }
}

// out[j][i] = map[codes[blocks[i] + j]], likewise.
template <class V>
[[gnu::optimize("no-tree-vectorize")]] void read_lane_map(const std::uint8_t* codes,
                                                          const std::int64_t (&blocks)[V::kWidth],
                                                          std::int64_t n, float (*out)[V::kWidth]) {
  for (int i = 0; i < V::kWidth; ++i) {
    const std::uint8_t* from = codes + blocks[i];
    for (std::int64_t j = 0; j < n; ++j) out[j][i] = kDynamicMapSigned[from[j]];
  }
}

// out[i] = the scale of block first + i.
//
// The arithmetic on vectors waits until the whole map is read: a wide load right behind the narrow
// stores it spans would stall until they have left the store queue.
template <class V>
void block_scales(const Scales& scales, std::int64_t first, std::int64_t n, float* out) {
  if (!scales.double_quantized()) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = scales.absmax[first + i];
    return;
  }
  read_map<V>(kDynamicMapSigned, scales.absmax_q8 + first, n, out);
  apply_nested_scales<V>(scales, first, n, out);
}

}  // namespace qlora::cpu
