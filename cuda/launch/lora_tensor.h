// The skinny products on the tensor cores (lora_tensor.cu), for those whose LoraRuns say so.
#pragma once

#include "launch/lora.h"

namespace qlora::cuda {

Status lora_u_tensor(const LoraRuns& runs, const QloraLinearParams& p, float* sums,
                     const Context& context);
Status lora_g_tensor(const LoraRuns& runs, const QloraLinearBackwardParams& p, float* sums,
                     const Context& context);
// One launch for those whose sums are not null.
Status lora_gradients_tensor(const LoraGradientSums& sums, const QloraLinearBackwardParams& p,
                             const float* g, const Context& context);

}  // namespace qlora::cuda
