// Every op's entry point under its name, for a device's registration: they are the same for each
// (device.h).
#pragma once

#include "ops.h"

namespace qlora::torch_ops {

template <class Library>
void implement_all(Library& m) {
  m.impl("quantize_4bit", TORCH_BOX(&quantize_4bit));
  m.impl("quantize_4bit.out", TORCH_BOX(&quantize_4bit_out));
  m.impl("dequantize_4bit", TORCH_BOX(&dequantize_4bit));
  m.impl("dequantize_4bit.out", TORCH_BOX(&dequantize_4bit_out));
  m.impl("quantize_8bit", TORCH_BOX(&quantize_8bit));
  m.impl("quantize_8bit.out", TORCH_BOX(&quantize_8bit_out));
  m.impl("dequantize_8bit", TORCH_BOX(&dequantize_8bit));
  m.impl("dequantize_8bit.out", TORCH_BOX(&dequantize_8bit_out));
  m.impl("quantize_scales", TORCH_BOX(&quantize_scales));
  m.impl("dequantize_scales", TORCH_BOX(&dequantize_scales));

  m.impl("linear_4bit", TORCH_BOX(&linear_4bit));
  m.impl("linear_4bit.out", TORCH_BOX(&linear_4bit_out));
  m.impl("linear_4bit_backward_input", TORCH_BOX(&linear_4bit_backward_input));
  m.impl("qlora_linear", TORCH_BOX(&qlora_linear));
  m.impl("qlora_linear_backward", TORCH_BOX(&qlora_linear_backward));

  m.impl("grouped_linear_4bit", TORCH_BOX(&grouped_linear_4bit));
  m.impl("grouped_linear_4bit_backward_input", TORCH_BOX(&grouped_linear_4bit_backward_input));

  m.impl("adamw_step", TORCH_BOX(&adamw_step));
  m.impl("adamw_8bit_step", TORCH_BOX(&adamw_8bit_step));
  m.impl("lion_step", TORCH_BOX(&lion_step));
  m.impl("lion_8bit_step", TORCH_BOX(&lion_8bit_step));
  m.impl("sgd_step", TORCH_BOX(&sgd_step));
  m.impl("sgd_8bit_step", TORCH_BOX(&sgd_8bit_step));
}

}  // namespace qlora::torch_ops
