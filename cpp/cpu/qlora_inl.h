// The 4-bit linear layer with its LoRA branch, and their gradients, each as one op.
//
//   forward    u = drop(x) A^T                          [M, R]  its own product: y needs all of u
//              y = x W^T + bias + scale * u B^T         [M, N]  two segments of one product
//   backward   g = scale * grad_out B                   [M, R]
//              grad_x = mask * (gain * g A) + grad_out W        two segments, the mask between them
//              grad_a = g^T drop(x)                     [R, K]
//              grad_b = (scale * u^T grad_out)^T        [N, R]  as [R, N], written transposed
//              grad_bias = column sums of grad_out      [N]
//
// Every product has the large dimension across the vectors and R either as depth or as rows, so
// that at r = 16 each of them costs about R / N of a base product. LoRA products are fp32
// throughout.
#pragma once

#include <cstdint>

#include "gemm_inl.h"
#include "gemv_inl.h"
#include "linear_inl.h"
#include "qlora_native/backend.h"

namespace qlora::cpu {

template <class V>
Status qlora_linear(const QloraLinearParams& p, const Context& context) {
  const LinearParams& base = p.base;
  const Lora& lora = p.lora;
  const std::int64_t k = base.weight.cols, n = base.weight.rows;
  if (base.m <= kGemvMaxRows<V>) return gemv<V>(base, {.lora = &lora, .u = p.u}, context);

  const Dropout dropout = make_dropout<V>(lora);
  const Segment down[] = {
      {.operand = {.dtype = base.dtype,
                   .data = base.x,
                   .row_stride = k,
                   .factor = dropout.gain,
                   .dropout = dropout},
       .source = {.transposed = true, .dtype = lora.dtype, .data = lora.a, .row_stride = k},
       .depth = k}};
  const GemmOutput u = {.dtype = DType::float32, .data = p.u, .row_stride = lora.r};
  const Segment up = {
      .operand = {.dtype = DType::float32, .data = p.u, .row_stride = lora.r, .factor = lora.scale},
      .source = {.transposed = true, .dtype = lora.dtype, .data = lora.b, .row_stride = lora.r},
      .depth = lora.r};
  const Segment both[] = {base_forward<V>(base.weight, base.dtype, base.x), up};
  const GemmOutput out = {
      .dtype = base.dtype, .data = base.out, .row_stride = n, .bias = base.bias};
  return run_products<V>(
      {GemmPlan<V>(base.m, lora.r, down, u, context), GemmPlan<V>(base.m, n, both, out, context)},
      context);
}

// g = scale * grad_out B
template <class V>
GemmPlan<V> plan_g(const QloraLinearBackwardParams& p, float* g, const Context& context) {
  const std::int64_t n = p.weight.rows, r = p.lora.r;
  const Segment product[] = {
      {.operand = {.dtype = p.dtype, .data = p.grad_out, .row_stride = n, .factor = p.lora.scale},
       .source = {.transposed = false, .dtype = p.lora.dtype, .data = p.lora.b, .row_stride = r},
       .depth = n}};
  return GemmPlan<V>(p.m, r, product, {.dtype = DType::float32, .data = g, .row_stride = r},
                     context);
}

// grad_x = grad_out W + mask * (gain * g A)
template <class V>
GemmPlan<V> plan_grad_x(const QloraLinearBackwardParams& p, const float* g, const Dropout& dropout,
                        const Context& context) {
  const std::int64_t k = p.weight.cols;
  const Segment lora = {
      .operand = {.dtype = DType::float32,
                  .data = g,
                  .row_stride = p.lora.r,
                  .factor = dropout.gain},
      .source = {.transposed = false, .dtype = p.lora.dtype, .data = p.lora.a, .row_stride = k},
      .depth = p.lora.r,
      .mask_after = dropout};
  const Segment both[] = {lora, base_backward<V>(p.weight, p.dtype, p.grad_out)};
  const GemmOutput grad_x = {.dtype = p.dtype, .data = p.grad_x, .row_stride = k};
  return GemmPlan<V>(p.m, k, both, grad_x, context);
}

// grad_a = g^T drop(x)
template <class V>
GemmPlan<V> plan_grad_a(const QloraLinearBackwardParams& p, const float* g, const Dropout& dropout,
                        const Context& context) {
  const std::int64_t k = p.weight.cols;
  const Segment product[] = {
      {.operand = {.dtype = DType::float32, .data = g, .row_stride = 1, .depth_stride = p.lora.r},
       .source = {.transposed = false,
                  .dtype = p.dtype,
                  .data = p.x,
                  .row_stride = k,
                  .dropout = dropout},
       .depth = p.m}};
  const GemmOutput grad_a = {.dtype = p.lora.dtype, .data = p.grad_a, .row_stride = k};
  return GemmPlan<V>(p.lora.r, k, product, grad_a, context);
}

// grad_b^T = scale * u^T grad_out
template <class V>
GemmPlan<V> plan_grad_b(const QloraLinearBackwardParams& p, const Context& context) {
  const std::int64_t n = p.weight.rows, r = p.lora.r;
  const Segment product[] = {
      {.operand = {.dtype = DType::float32,
                   .data = p.u,
                   .row_stride = 1,
                   .depth_stride = r,
                   .factor = p.lora.scale},
       .source = {.transposed = false, .dtype = p.dtype, .data = p.grad_out, .row_stride = n},
       .depth = p.m}};
  const GemmOutput grad_b = {
      .dtype = p.lora.dtype, .data = p.grad_b, .row_stride = 1, .col_stride = r};
  return GemmPlan<V>(r, n, product, grad_b, context);
}

template <class V, class T>
void column_sums(const T* rows, std::int64_t m, std::int64_t n, const Context& context, T* sums) {
  constexpr std::int64_t kGrain = 256;
  constexpr std::int64_t kRun = 32;  // rows to a partial sum: one long sum loses bits
  parallel_for(context, ceil_div(n, V::kWidth), kGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t c = begin * V::kWidth; c < end * V::kWidth; c += V::kWidth) {
      const std::int64_t count = least(V::kWidth, n - c);
      auto sum = V::zero();
      for (std::int64_t first = 0; first < m; first += kRun) {
        auto part = V::zero();
        for (std::int64_t i = first; i < least(first + kRun, m); ++i) {
          part = V::add(part, V::load_n(rows + i * n + c, count));
        }
        sum = V::add(sum, part);
      }
      V::store_n(sums + c, sum, count);
    }
  });
}

template <class V>
Status qlora_linear_backward(const QloraLinearBackwardParams& p, const Context& context) {
  const Dropout dropout = make_dropout<V>(p.lora);
  const Workspace workspace(static_cast<std::size_t>(p.m * p.lora.r) * sizeof(float));
  auto* g = workspace.as<float>();
  if (g == nullptr) return kOutOfMemory;
  const bool needs_g = p.grad_x != nullptr || p.grad_a != nullptr;
  GemmPlan<V> plans[4];
  if (needs_g) plans[0] = plan_g<V>(p, g, context);
  if (p.grad_x != nullptr) plans[1] = plan_grad_x<V>(p, g, dropout, context);
  if (p.grad_a != nullptr) plans[2] = plan_grad_a<V>(p, g, dropout, context);
  if (p.grad_b != nullptr) plans[3] = plan_grad_b<V>(p, context);
  const Status status = run_products(plans, context);
  if (status.ok() && p.grad_bias != nullptr) {
    with_type(p.dtype, [&]<class T>() {
      column_sums<V, T>(static_cast<const T*>(p.grad_out), p.m, p.weight.rows, context,
                        static_cast<T*>(p.grad_bias));
    });
  }
  return status;
}

}  // namespace qlora::cpu
