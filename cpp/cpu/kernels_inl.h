// Every kernel of the CPU backend over one SIMD vocabulary V, as a Backend.
//
// Included by the isa_*.cpp files alone, each compiled for its own instruction set: no std::
// container may stand in what this includes, or the linker might keep a copy that others cannot
// run.
#pragma once

#include "adamw_inl.h"
#include "dequantize_inl.h"
#include "linear_inl.h"
#include "lion_inl.h"
#include "qlora_inl.h"
#include "qlora_native/backend.h"
#include "quantize_inl.h"
#include "sgd_inl.h"
#include "step_8bit_inl.h"
#include "step_inl.h"

namespace qlora::cpu {

template <class V>
constexpr Backend make_backend(const char* name) {
  return {
      .name = name,
      .quantize_4bit = quantize_4bit<V>,
      .dequantize_4bit = dequantize_4bit<V>,
      .quantize_8bit = quantize_8bit<V>,
      .dequantize_8bit = dequantize_8bit<V>,
      .quantize_scales = quantize_scales<V>,
      .dequantize_scales = dequantize_scales<V>,
      .linear_4bit = linear_4bit<V>,
      .linear_4bit_backward_input = linear_4bit_backward_input<V>,
      .qlora_linear = qlora_linear<V>,
      .qlora_linear_backward = qlora_linear_backward<V>,
      .adamw_step = step<V, AdamwRule<V>, AdamwStepParams>,
      .adamw_8bit_step = step_8bit<V, AdamwRule<V>, Adamw8bitStepParams>,
      .lion_step = step<V, LionRule<V>, LionStepParams>,
      .lion_8bit_step = step_8bit<V, LionRule<V>, Lion8bitStepParams>,
      .sgd_step = step<V, SgdRule<V>, SgdStepParams>,
      .sgd_8bit_step = step_8bit<V, SgdRule<V>, Sgd8bitStepParams>,
  };
}

}  // namespace qlora::cpu
