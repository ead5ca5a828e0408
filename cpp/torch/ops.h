// The ops' entry points, as schemas.cpp states them: tensors -> checks -> Params -> backend.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "stable.h"

namespace qlora::torch_ops {

using Tensors = std::vector<Tensor>;
using Shape = std::vector<std::int64_t>;

// ---- quantization: ops_quantize.cpp ----
std::tuple<Tensor, Tensor> quantize_4bit(Tensor x, std::int64_t blocksize, std::string format);
void quantize_4bit_out(Tensor x, std::int64_t blocksize, std::string format, Tensor packed,
                       Tensor absmax);
Tensor dequantize_4bit(Tensor packed, Tensor absmax, OptionalTensor nested_absmax,
                       OptionalTensor nested_offset, Shape shape, std::int64_t blocksize,
                       std::string format, ScalarType dtype);
void dequantize_4bit_out(Tensor packed, Tensor absmax, OptionalTensor nested_absmax,
                         OptionalTensor nested_offset, std::int64_t blocksize, std::string format,
                         Tensor out);
std::tuple<Tensor, Tensor> quantize_8bit(Tensor x, std::int64_t blocksize, bool is_signed,
                                         std::string rounding);
void quantize_8bit_out(Tensor x, std::int64_t blocksize, bool is_signed, std::string rounding,
                       Tensor codes, Tensor absmax);
Tensor dequantize_8bit(Tensor codes, Tensor absmax, std::int64_t blocksize, bool is_signed,
                       ScalarType dtype);
void dequantize_8bit_out(Tensor codes, Tensor absmax, std::int64_t blocksize, bool is_signed,
                         Tensor out);
std::tuple<Tensor, Tensor, Tensor> quantize_scales(Tensor absmax, std::string rounding,
                                                   OptionalTensor offset);
Tensor dequantize_scales(Tensor absmax_q8, Tensor nested_absmax, Tensor nested_offset);

// ---- linear: ops_linear.cpp ----
Tensor linear_4bit(Tensor x, Tensor packed, Tensor absmax, OptionalTensor nested_absmax,
                   OptionalTensor nested_offset, std::int64_t out_features, std::int64_t blocksize,
                   std::string format, OptionalTensor bias);
void linear_4bit_out(Tensor x, Tensor packed, Tensor absmax, OptionalTensor nested_absmax,
                     OptionalTensor nested_offset, std::int64_t blocksize, std::string format,
                     OptionalTensor bias, Tensor out);
Tensor linear_4bit_backward_input(Tensor grad_out, Tensor packed, Tensor absmax,
                                  OptionalTensor nested_absmax, OptionalTensor nested_offset,
                                  std::int64_t in_features, std::int64_t blocksize,
                                  std::string format);
std::tuple<Tensor, Tensor> qlora_linear(Tensor x, Tensor packed, Tensor absmax,
                                        OptionalTensor nested_absmax, OptionalTensor nested_offset,
                                        std::int64_t blocksize, std::string format,
                                        OptionalTensor bias, Tensor lora_a, Tensor lora_b,
                                        double lora_scale, double dropout_p,
                                        OptionalTensor dropout_seed);
std::tuple<Tensor, Tensor, Tensor, Tensor> qlora_linear_backward(
    Tensor grad_out, Tensor x, Tensor u, Tensor packed, Tensor absmax, OptionalTensor nested_absmax,
    OptionalTensor nested_offset, std::int64_t blocksize, std::string format, Tensor lora_a,
    Tensor lora_b, double lora_scale, double dropout_p, OptionalTensor dropout_seed,
    bool need_grad_x, bool need_grad_a, bool need_grad_b, bool need_grad_bias);

// ---- linear by groups of rows: ops_grouped.cpp ----
Tensor grouped_linear_4bit(Tensor x, Tensor offsets, Tensor packed, Tensor absmax,
                           OptionalTensor nested_absmax, OptionalTensor nested_offset,
                           std::int64_t out_features, std::int64_t blocksize, std::string format);
Tensor grouped_linear_4bit_backward_input(Tensor grad_out, Tensor offsets, Tensor packed,
                                          Tensor absmax, OptionalTensor nested_absmax,
                                          OptionalTensor nested_offset, std::int64_t in_features,
                                          std::int64_t blocksize, std::string format);

// ---- optimizer: ops_optim.cpp ----
void adamw_step(Tensors params, Tensors grads, Tensors exp_avg, Tensors exp_avg_sq, double lr,
                double beta1, double beta2, double eps, double weight_decay, std::int64_t step,
                bool maximize, OptionalTensor grad_scale, OptionalTensor found_inf);
void adamw_8bit_step(Tensors params, Tensors grads, Tensors exp_avg, Tensors exp_avg_sq,
                     Tensors exp_avg_absmax, Tensors exp_avg_sq_absmax, double lr, double beta1,
                     double beta2, double eps, double weight_decay, std::int64_t step,
                     bool maximize, OptionalTensor grad_scale, OptionalTensor found_inf);
void lion_step(Tensors params, Tensors grads, Tensors exp_avg, double lr, double beta1,
               double beta2, double weight_decay, bool maximize, OptionalTensor grad_scale,
               OptionalTensor found_inf);
void lion_8bit_step(Tensors params, Tensors grads, Tensors exp_avg, Tensors exp_avg_absmax,
                    double lr, double beta1, double beta2, double weight_decay, bool maximize,
                    OptionalTensor grad_scale, OptionalTensor found_inf);
void sgd_step(Tensors params, Tensors grads, Tensors momentum_buffer, double lr, double momentum,
              double dampening, double weight_decay, bool nesterov, bool first_step, bool maximize,
              OptionalTensor grad_scale, OptionalTensor found_inf);
void sgd_8bit_step(Tensors params, Tensors grads, Tensors momentum_buffer,
                   Tensors momentum_buffer_absmax, double lr, double momentum, double dampening,
                   double weight_decay, bool nesterov, bool first_step, bool maximize,
                   OptionalTensor grad_scale, OptionalTensor found_inf);

}  // namespace qlora::torch_ops
