// Which backend serves a tensor, and what torch lends it: the one place where a device has a name.
#pragma once

#include "qlora_native/backend.h"
#include "stable.h"

namespace qlora::torch_ops {

struct Device {
  const Backend& backend;
  Context context;
};

Device device_of(const Tensor& t);

}  // namespace qlora::torch_ops
