// torch's matrix product on memory that is not a tensor's: what a backend asks for by
// Context::matmul.
#pragma once

#include "qlora_native/params.h"
#include "stable.h"

namespace qlora::torch_ops {

// aten::addmm into params.out, on the device of `on` and its current stream, under
// torch's own settings (TF32, reduced-precision reduction). Throws what torch reports.
void torch_matmul(const Tensor& on, const MatmulParams& params);

}  // namespace qlora::torch_ops
