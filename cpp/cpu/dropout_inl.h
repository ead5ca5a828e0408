// The dropout mask (dropout.h) a vector at a time: the same bits as its scalar definition.
#pragma once

#include <cstdint>

#include "qlora_native/dropout.h"
#include "qlora_native/params.h"

namespace qlora::cpu {

// What the LoRA branch's dropout needs; inactive at p = 0.
struct Dropout {
  bool active = false;
  std::uint64_t seed = 0;
  std::uint32_t threshold = 0;
  float gain = 1.0f;  // of a kept element
};

template <class V>
Dropout make_dropout(const Lora& lora) {
  if (!(lora.dropout_p > 0.0f)) return {};
  return {.active = true,
          .seed = static_cast<std::uint64_t>(*lora.dropout_seed),
          .threshold = dropout_threshold(lora.dropout_p),
          .gain = dropout_gain(lora.dropout_p)};
}

// One row of the mask. apply() zeroes what is dropped and leaves the gain to the caller, who has a
// factor to fold it into.
template <class V>
struct DropoutRow {
  using F = typename V::F;
  using I = typename V::I;

  DropoutRow(const Dropout& dropout, std::int64_t row) {
    const DropoutRowKey key = dropout_row_key(dropout.seed, row);
    add = V::set1_int(static_cast<std::int32_t>(key.add));
    mix = V::set1_int(static_cast<std::int32_t>(key.mix));
    below = V::set1_int(static_cast<std::int32_t>(dropout.threshold - 1));
  }

  // v holds the elements from `column` on. "Kept" reads bits > threshold - 1, so that a threshold
  // of 2^31 (p = 1) keeps nothing in a signed comparison.
  F apply(F v, std::int64_t column) const {
    I x = V::add(V::set1_int(static_cast<std::int32_t>(column)), V::lane_index());
    x = V::add(x, add);
    x = V::mul(V::bit_xor(x, V::template shift_right_zeros<16>(x)), V::set1_int(0x7FEB352D));
    x = V::add(V::bit_xor(x, V::template shift_right_zeros<15>(x)), mix);
    x = V::mul(x, V::set1_int(static_cast<std::int32_t>(0x846CA68Bu)));
    x = V::bit_xor(x, V::template shift_right_zeros<16>(x));
    return V::keep_if_greater(v, V::template shift_right_zeros<1>(x), below);
  }

  I add, mix, below;
};

}  // namespace qlora::cpu
