// What torch lends to the CUDA backend: the current stream of a tensor's device.
#pragma once

#include "device.h"

namespace qlora::torch_ops {

Device cuda_device_of(const Tensor& t);

}  // namespace qlora::torch_ops
