#include "device.h"

#include <stdexcept>

#include "../cpu/isa.h"
#include "qlora_native/runtime.h"

namespace qlora {

int num_threads() { return static_cast<int>(::torch::stable::get_num_threads()); }

namespace torch_ops {
namespace {

// torch's own pool, so that torch.set_num_threads rules and no second pool competes with it.
void torch_pool(std::int64_t n, std::int64_t grain, Context::Body body, void* arg) {
  struct Call {
    Context::Body body;
    void* arg;
  } call{body, arg};
  const ParallelFunc run = [](std::int64_t begin, std::int64_t end, void* context) {
    const Call& c = *static_cast<const Call*>(context);
    c.body(c.arg, begin, end);
  };
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, grain, run, &call));
}

}  // namespace

Device device_of(const Tensor& t) {
  if (t.is_cpu()) {
    return {cpu::backend(), {.parallel_for = torch_pool, .threads = num_threads()}};
  }
  throw std::runtime_error("qlora_native has no backend for this tensor's device; it serves: cpu");
}

}  // namespace torch_ops
}  // namespace qlora
