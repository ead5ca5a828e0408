// Which backend serves a tensor, and what torch lends it: the one place where a device has a name.
#pragma once

#include <vector>

#include "qlora_native/backend.h"
#include "stable.h"

namespace qlora::torch_ops {

// Lives as long as the op: what it lends is held here.
class Device {
 public:
  // Lends memory where `on` is, and torch's matrix product.
  Device(const Backend& serves, const Context& lent, const Tensor& on);
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const Backend& backend;
  Context context;

 private:
  static void* allocate(void* self, std::int64_t bytes);
  static Status matmul(void* self, const MatmulParams& params);

  Tensor on_;
  std::vector<Tensor> held_;  // what was allocated
};

Device device_of(const Tensor& t);

}  // namespace qlora::torch_ops
