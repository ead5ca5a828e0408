// Both directions of the CUDA-core way.
#include "device/launch.cuh"
#include "kernels/linear_fma.cuh"
#include "launch/linear_paths.h"
#include "launch/operands.h"
#include "qlora_native/dispatch.h"

namespace qlora::cuda {
namespace {

// out [M, cols] = x [M, depth] times the weight or its transpose.
template <class T, bool kForward>
Status run(std::int64_t m, const Weight4bit& weight, const void* x, const void* bias, void* out,
           const LoraTerm* lora, const Context& context) {
  const std::int64_t cols = kForward ? weight.rows : weight.cols;
  const std::int64_t depth = kForward ? weight.cols : weight.rows;
  LinearFmaArguments<T> a{.m = m,
                          .x = rows_operand<T>(x, m, depth),
                          .weight = device_weight(weight),
                          .r = 0,
                          .lora_left = {},
                          .lora_right = {},
                          .dropout = {},
                          .has_bias = bias != nullptr,
                          .out_aligned = false,
                          .bias = {static_cast<const T*>(bias), bias != nullptr ? cols : 0},
                          .out_cols = cols,
                          .out = {static_cast<T*>(out), m * cols}};
  a.out_aligned = cols % kQuad == 0 && a.out.aligned(kQuad * sizeof(T));
  if (lora != nullptr) {
    a.r = lora->r;
    a.lora_left = rows_operand<T>(lora->left, m, lora->r);
    a.lora_right = rows_operand<T>(lora->right, cols, lora->r);
    a.dropout = device_dropout(lora->dropout_p, lora->dropout_seed);
  }
  return with_flag(weight.scales.double_quantized(), [&]<bool kDouble>() {
    return launch(linear_fma_kernel<T, kDouble, kForward>,
                  {.grid = ceil_div(m, 64) * ceil_div(cols, 64),
                   .block = LinearFmaTile::kThreads,
                   .stream = context.stream},
                  a);
  });
}

}  // namespace

Status linear_fma(const LinearParams& p, const LoraTerm* lora, const Context& context) {
  return with_type(p.dtype, [&]<class T>() {
    return run<T, true>(p.m, p.weight, p.x, p.bias, p.out, lora, context);
  });
}

Status backward_input_fma(const LinearBackwardInputParams& p, const LoraTerm* lora,
                          const Context& context) {
  return with_type(p.dtype, [&]<class T>() {
    return run<T, false>(p.m, p.weight, p.grad_out, nullptr, p.grad_x, lora, context);
  });
}

}  // namespace qlora::cuda
