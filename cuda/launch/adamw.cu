// adamw_step and adamw_8bit_step.
#include "kernels/adamw.cuh"
#include "kernels/adamw_8bit.cuh"
#include "launch/launchers.h"
#include "launch/tensor_lists.h"

namespace qlora::cuda {

Status adamw_step(const AdamwStepParams& p, const Context& context) {
  return launch_tensor_lists(
      adamw_kernel, p.hyper, p.tensors, p.n_tensors, context.stream,
      [](const AdamwTensor& t) -> AdamwDeviceTensor {
        return {.n = t.n,
                .param = {t.param, t.param_dtype},
                .grad = {t.grad, t.grad_dtype},
                .exp_avg = {t.exp_avg, t.n},
                .exp_avg_sq = {t.exp_avg_sq, t.n},
                .aligned = aligned_to(t.param, 16) && aligned_to(t.grad, 16) &&
                           aligned_to(t.exp_avg, 16) && aligned_to(t.exp_avg_sq, 16)};
      });
}

Status adamw_8bit_step(const Adamw8bitStepParams& p, const Context& context) {
  return launch_tensor_lists(
      adamw_8bit_kernel, p.hyper, p.tensors, p.n_tensors, context.stream,
      [](const Adamw8bitTensor& t) -> Adamw8bitDeviceTensor {
        const std::int64_t blocks = n_blocks(t.n, kOptimizerBlocksize);
        return {.n = t.n,
                .param = {t.param, t.param_dtype},
                .grad = {t.grad, t.grad_dtype},
                .exp_avg = {t.exp_avg, t.n},
                .exp_avg_sq = {t.exp_avg_sq, t.n},
                .exp_avg_absmax = {t.exp_avg_absmax, blocks},
                .exp_avg_sq_absmax = {t.exp_avg_sq_absmax, blocks},
                .aligned = aligned_to(t.param, 16) && aligned_to(t.grad, 16) &&
                           aligned_to(t.exp_avg, 8) && aligned_to(t.exp_avg_sq, 8)};
      });
}

}  // namespace qlora::cuda
