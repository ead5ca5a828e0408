// Every op of the library: the API on one page. Shapes, dtypes and errors of each are told in
// python/qlora_native/ops.py; docs/adding_an_op.md names the eight places an op stands in.
//
// A 4-bit weight [N, K] travels as its parts: packed, absmax, and, where the scales are
// double-quantized (absmax is then uint8), nested_absmax and nested_offset. x may have any leading
// dimensions, [..., K]; their product is M.
#include "stable.h"

STABLE_TORCH_LIBRARY(qlora_native, m) {
  // ---- quantization ----
  m.def("quantize_4bit(Tensor x, int blocksize, str format) -> (Tensor packed, Tensor absmax)");
  m.def(
      "quantize_4bit.out(Tensor x, int blocksize, str format, *, Tensor(a!) packed, "
      "Tensor(b!) absmax) -> ()");
  m.def(
      "dequantize_4bit(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, "
      "int[] shape, int blocksize, str format, ScalarType dtype) -> Tensor");
  m.def(
      "dequantize_4bit.out(Tensor packed, Tensor absmax, Tensor? nested_absmax, "
      "Tensor? nested_offset, int blocksize, str format, *, Tensor(a!) out) -> ()");
  m.def(
      "quantize_8bit(Tensor x, int blocksize, bool signed, str rounding) -> "
      "(Tensor codes, Tensor absmax)");
  m.def(
      "quantize_8bit.out(Tensor x, int blocksize, bool signed, str rounding, *, "
      "Tensor(a!) codes, Tensor(b!) absmax) -> ()");
  m.def(
      "dequantize_8bit(Tensor codes, Tensor absmax, int blocksize, bool signed, ScalarType dtype) "
      "-> Tensor");
  m.def(
      "dequantize_8bit.out(Tensor codes, Tensor absmax, int blocksize, bool signed, *, "
      "Tensor(a!) out) -> ()");
  m.def(
      "quantize_scales(Tensor absmax, str rounding, Tensor? offset) -> "
      "(Tensor absmax_q8, Tensor nested_absmax, Tensor nested_offset)");
  m.def(
      "dequantize_scales(Tensor absmax_q8, Tensor nested_absmax, Tensor nested_offset) -> Tensor");

  // ---- linear ----
  m.def(
      "linear_4bit(Tensor x, Tensor packed, Tensor absmax, Tensor? nested_absmax, "
      "Tensor? nested_offset, int out_features, int blocksize, str format, Tensor? bias) -> "
      "Tensor");
  m.def(
      "linear_4bit.out(Tensor x, Tensor packed, Tensor absmax, Tensor? nested_absmax, "
      "Tensor? nested_offset, int blocksize, str format, Tensor? bias, *, Tensor(a!) out) -> ()");
  m.def(
      "linear_4bit_backward_input(Tensor grad_out, Tensor packed, Tensor absmax, "
      "Tensor? nested_absmax, Tensor? nested_offset, int in_features, int blocksize, str format) "
      "-> Tensor");
  m.def(
      "qlora_linear(Tensor x, Tensor packed, Tensor absmax, Tensor? nested_absmax, "
      "Tensor? nested_offset, int blocksize, str format, Tensor? bias, Tensor lora_a, "
      "Tensor lora_b, float lora_scale, float dropout_p, Tensor? dropout_seed) -> "
      "(Tensor out, Tensor u)");
  m.def(
      "qlora_linear_backward(Tensor grad_out, Tensor x, Tensor u, Tensor packed, Tensor absmax, "
      "Tensor? nested_absmax, Tensor? nested_offset, int blocksize, str format, Tensor lora_a, "
      "Tensor lora_b, float lora_scale, float dropout_p, Tensor? dropout_seed, "
      "bool need_grad_x, bool need_grad_a, bool need_grad_b, bool need_grad_bias) -> "
      "(Tensor grad_x, Tensor grad_a, Tensor grad_b, Tensor grad_bias)");

  // ---- linear by groups of rows: group g of offsets [n_groups] is rows offsets[g-1] to offsets[g]
  // of x, multiplied with matrix g of a stack [n_groups, N, K] ----
  m.def(
      "grouped_linear_4bit(Tensor x, Tensor offsets, Tensor packed, Tensor absmax, "
      "Tensor? nested_absmax, Tensor? nested_offset, int out_features, int blocksize, str format) "
      "-> Tensor");
  m.def(
      "grouped_linear_4bit_backward_input(Tensor grad_out, Tensor offsets, Tensor packed, "
      "Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, int in_features, "
      "int blocksize, str format) -> Tensor");

  // ---- optimizer: many tensors in one call, state updated in place ----
  m.def(
      "adamw_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, "
      "Tensor(c!)[] exp_avg_sq, float lr, float beta1, float beta2, float eps, "
      "float weight_decay, int step, bool maximize, Tensor? grad_scale, Tensor? found_inf) -> ()");
  m.def(
      "adamw_8bit_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, "
      "Tensor(c!)[] exp_avg_sq, Tensor(d!)[] exp_avg_absmax, Tensor(e!)[] exp_avg_sq_absmax, "
      "float lr, float beta1, float beta2, float eps, float weight_decay, int step, "
      "bool maximize, Tensor? grad_scale, Tensor? found_inf) -> ()");
  m.def(
      "lion_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, float lr, "
      "float beta1, float beta2, float weight_decay, bool maximize, Tensor? grad_scale, "
      "Tensor? found_inf) -> ()");
  m.def(
      "lion_8bit_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, "
      "Tensor(c!)[] exp_avg_absmax, float lr, float beta1, float beta2, float weight_decay, "
      "bool maximize, Tensor? grad_scale, Tensor? found_inf) -> ()");
  m.def(
      "sgd_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffer, float lr, "
      "float momentum, float dampening, float weight_decay, bool nesterov, bool first_step, "
      "bool maximize, Tensor? grad_scale, Tensor? found_inf) -> ()");
  m.def(
      "sgd_8bit_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffer, "
      "Tensor(c!)[] momentum_buffer_absmax, float lr, float momentum, float dampening, "
      "float weight_decay, bool nesterov, bool first_step, bool maximize, Tensor? grad_scale, "
      "Tensor? found_inf) -> ()");
}
