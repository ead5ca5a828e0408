// The table of the CUDA backend's functions. Each makes the caller's device the current one.
#include "backend.h"
#include "device/launch.cuh"
#include "launch/launchers.h"

namespace qlora::cuda {
namespace {

template <auto kOp, class Params>
Status on_device(const Params& params, const Context& context) {
  const DeviceGuard guard(context.device);
  return guard.status().ok() ? kOp(params, context) : guard.status();
}

constexpr Backend kBackend = {
    .name = kBackendName,
    .quantize_4bit = on_device<quantize_4bit, Quantize4bitParams>,
    .dequantize_4bit = on_device<dequantize_4bit, Dequantize4bitParams>,
    .quantize_8bit = on_device<quantize_8bit, Quantize8bitParams>,
    .dequantize_8bit = on_device<dequantize_8bit, Dequantize8bitParams>,
    .quantize_scales = on_device<quantize_scales, QuantizeScalesParams>,
    .dequantize_scales = on_device<dequantize_scales, DequantizeScalesParams>,
    .linear_4bit = on_device<linear_4bit, LinearParams>,
    .linear_4bit_backward_input = on_device<linear_4bit_backward_input, LinearBackwardInputParams>,
    .qlora_linear = on_device<qlora_linear, QloraLinearParams>,
    .qlora_linear_backward = on_device<qlora_linear_backward, QloraLinearBackwardParams>,
    .adamw_step = on_device<adamw_step, AdamwStepParams>,
    .adamw_8bit_step = on_device<adamw_8bit_step, Adamw8bitStepParams>,
    .lion_step = on_device<lion_step, LionStepParams>,
    .lion_8bit_step = on_device<lion_8bit_step, Lion8bitStepParams>,
    .sgd_step = on_device<sgd_step, SgdStepParams>,
    .sgd_8bit_step = on_device<sgd_8bit_step, Sgd8bitStepParams>,
};

}  // namespace

const Backend& backend() { return kBackend; }

}  // namespace qlora::cuda
