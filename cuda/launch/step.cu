// The steps of the optimizers, with 32-bit and with 8-bit state.
#include "kernels/adamw_update.cuh"
#include "kernels/lion_update.cuh"
#include "kernels/sgd_update.cuh"
#include "kernels/step.cuh"
#include "kernels/step_8bit.cuh"
#include "launch/launchers.h"
#include "launch/tensor_lists.h"

namespace qlora::cuda {
namespace {

template <int kMoments>
StepDeviceTensor<kMoments> device_tensor(const StepTensor<kMoments>& t) {
  StepDeviceTensor<kMoments> result{.n = t.n,
                                    .param = {t.param, t.param_dtype},
                                    .grad = {t.grad, t.grad_dtype},
                                    .moments = {},
                                    .aligned = aligned_to(t.param, 16) && aligned_to(t.grad, 16)};
  for (int j = 0; j < kMoments; ++j) {
    result.moments[j] = {t.moments[j], t.n};
    result.aligned = result.aligned && aligned_to(t.moments[j], 16);
  }
  return result;
}

template <int kMoments>
Step8bitDeviceTensor<kMoments> device_tensor(const Step8bitTensor<kMoments>& t) {
  Step8bitDeviceTensor<kMoments> result{
      .n = t.n,
      .param = {t.param, t.param_dtype},
      .grad = {t.grad, t.grad_dtype},
      .codes = {},
      .absmax = {},
      .aligned = aligned_to(t.param, 16) && aligned_to(t.grad, 16)};
  for (int j = 0; j < kMoments; ++j) {
    result.codes[j] = {t.codes[j], t.n};
    result.absmax[j] = {t.absmax[j], n_blocks(t.n, kOptimizerBlocksize)};
    result.aligned = result.aligned && aligned_to(t.codes[j], 8);
  }
  return result;
}

template <class Arguments, class Params>
Status launch(void (*kernel)(Arguments), const Params& p, const Context& context) {
  const auto convert = [](const auto& t) { return device_tensor(t); };
  return launch_tensor_lists(kernel, rule_of(p.hyper), p.tensors, p.n_tensors, context.stream,
                             convert);
}

}  // namespace

Status adamw_step(const AdamwStepParams& p, const Context& context) {
  return launch(step_kernel<AdamwRule>, p, context);
}

Status adamw_8bit_step(const Adamw8bitStepParams& p, const Context& context) {
  return launch(step_8bit_kernel<AdamwRule>, p, context);
}

Status lion_step(const LionStepParams& p, const Context& context) {
  return launch(step_kernel<LionRule>, p, context);
}

Status lion_8bit_step(const Lion8bitStepParams& p, const Context& context) {
  return launch(step_8bit_kernel<LionRule>, p, context);
}

Status sgd_step(const SgdStepParams& p, const Context& context) {
  return launch(step_kernel<SgdRule>, p, context);
}

Status sgd_8bit_step(const Sgd8bitStepParams& p, const Context& context) {
  return launch(step_8bit_kernel<SgdRule>, p, context);
}

}  // namespace qlora::cuda
