// The launchers: parameters -> arguments of a kernel, grid, launch. The file of the same name has
// each, step.cu all optimizers.
#pragma once

#include "qlora_native/backend.h"

namespace qlora::cuda {

Status quantize_4bit(const Quantize4bitParams& params, const Context& context);
Status dequantize_4bit(const Dequantize4bitParams& params, const Context& context);
Status quantize_8bit(const Quantize8bitParams& params, const Context& context);
Status dequantize_8bit(const Dequantize8bitParams& params, const Context& context);
Status quantize_scales(const QuantizeScalesParams& params, const Context& context);
Status dequantize_scales(const DequantizeScalesParams& params, const Context& context);
Status linear_4bit(const LinearParams& params, const Context& context);
Status linear_4bit_backward_input(const LinearBackwardInputParams& params, const Context& context);
Status qlora_linear(const QloraLinearParams& params, const Context& context);
Status qlora_linear_backward(const QloraLinearBackwardParams& params, const Context& context);
Status adamw_step(const AdamwStepParams& params, const Context& context);
Status adamw_8bit_step(const Adamw8bitStepParams& params, const Context& context);
Status lion_step(const LionStepParams& params, const Context& context);
Status lion_8bit_step(const Lion8bitStepParams& params, const Context& context);
Status sgd_step(const SgdStepParams& params, const Context& context);
Status sgd_8bit_step(const Sgd8bitStepParams& params, const Context& context);

}  // namespace qlora::cuda
