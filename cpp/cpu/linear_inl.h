// The 4-bit linear layer and its input gradient.
//
//   linear_4bit                  out = x W^T + bias        few rows: gemv_inl.h, more: gemm_inl.h
//   linear_4bit_backward_input   grad_x = grad_out W       gemm_inl.h, W read the other way
//
// The weight is dequantized on its way into the product and never exists as a whole.
#pragma once

#include <cstdint>

#include "gemm_inl.h"
#include "gemv_inl.h"
#include "qlora_native/backend.h"

namespace qlora::cpu {

// A row-major matrix as the left-hand side of a product.
template <class V>
Operand rows_of(DType dtype, const void* data, std::int64_t row_stride) {
  return {.dtype = dtype, .data = data, .row_stride = row_stride};
}

// The multiplication for activations of `dtype`: bf16 stays bf16 where the processor multiplies it,
// with the weight rounded to bf16 as a dequantized bf16 weight would be; all else is widened to
// fp32.
template <class V>
Product product_of(const Weight4bit& weight, DType dtype) {
  const bool pairs = V::kHasBf16Pairs && dtype == DType::bfloat16 && WholeRows<V>::fits(weight);
  return pairs ? Product::bf16_pairs : Product::fp32;
}

// x W^T
template <class V>
Segment base_forward(const Weight4bit& weight, DType dtype, const void* x) {
  return {.operand = rows_of<V>(dtype, x, weight.cols),
          .source = {.transposed = true, .weight = &weight},
          .depth = weight.cols,
          .product = product_of<V>(weight, dtype)};
}

// grad_out W
template <class V>
Segment base_backward(const Weight4bit& weight, DType dtype, const void* grad_out) {
  return {.operand = rows_of<V>(dtype, grad_out, weight.rows),
          .source = {.transposed = false, .weight = &weight},
          .depth = weight.rows,
          .product = product_of<V>(weight, dtype)};
}

template <class V>
Status linear_4bit(const LinearParams& p, const Context& context) {
  if (p.m <= kGemvMaxRows<V>) return gemv<V>(p, GemvLora{}, context);
  const Segment base[] = {base_forward<V>(p.weight, p.dtype, p.x)};
  const GemmOutput out = {
      .dtype = p.dtype, .data = p.out, .row_stride = p.weight.rows, .bias = p.bias};
  return run_products<V>({GemmPlan<V>(p.m, p.weight.rows, base, out, context)}, context);
}

template <class V>
Status linear_4bit_backward_input(const LinearBackwardInputParams& p, const Context& context) {
  const Segment base[] = {base_backward<V>(p.weight, p.dtype, p.grad_out)};
  const GemmOutput grad_x = {.dtype = p.dtype, .data = p.grad_x, .row_stride = p.weight.cols};
  return run_products<V>({GemmPlan<V>(p.m, p.weight.cols, base, grad_x, context)}, context);
}

}  // namespace qlora::cpu
