// Both directions of the CUDA-core way, and the LoRA product alone.
#include "device/launch.cuh"
#include "kernels/linear_fma.cuh"
#include "launch/linear_paths.h"
#include "launch/operands.h"
#include "qlora_native/dispatch.h"

namespace qlora::cuda {
namespace {

template <class T>
LinearFmaArguments<T> arguments_of(std::int64_t m, std::int64_t cols, const void* bias, void* out,
                                   const LoraTerm* lora) {
  LinearFmaArguments<T> a{.m = m,
                          .x = {},
                          .weight = {},
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
  return a;
}

template <bool kDouble, FmaBase kBase, class T>
Status run(const LinearFmaArguments<T>& a, const Context& context) {
  return launch(linear_fma_kernel<T, kDouble, kBase>,
                {.grid = ceil_div(a.m, 64) * ceil_div(a.out_cols, 64),
                 .block = LinearFmaTile::kThreads,
                 .stream = context.stream},
                a);
}

template <FmaBase kBase, class T>
Status run(LinearFmaArguments<T> a, const Weight4bit& weight, const void* x,
           const Context& context) {
  a.x = rows_operand<T>(x, a.m, kBase == FmaBase::forward ? weight.cols : weight.rows);
  a.weight = device_weight(weight);
  return with_flag(weight.scales.double_quantized(),
                   [&]<bool kDouble>() { return run<kDouble, kBase>(a, context); });
}

}  // namespace

Status linear_fma(const LinearParams& p, const LoraTerm* lora, const Context& context) {
  return with_type(p.dtype, [&]<class T>() {
    return run<FmaBase::forward>(arguments_of<T>(p.m, p.weight.rows, p.bias, p.out, lora), p.weight,
                                 p.x, context);
  });
}

Status backward_input_fma(const LinearBackwardInputParams& p, const LoraTerm* lora,
                          const Context& context) {
  return with_type(p.dtype, [&]<class T>() {
    return run<FmaBase::backward_input>(
        arguments_of<T>(p.m, p.weight.cols, nullptr, p.grad_x, lora), p.weight, p.grad_out,
        context);
  });
}

Status add_lora_fma(DType dtype, std::int64_t m, std::int64_t cols, void* out, const LoraTerm& lora,
                    const Context& context) {
  return with_type(dtype, [&]<class T>() {
    return run<false, FmaBase::out>(arguments_of<T>(m, cols, nullptr, out, &lora), context);
  });
}

}  // namespace qlora::cuda
