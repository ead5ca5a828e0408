#include "device.h"

#include <atomic>
#include <stdexcept>

#include "../cpu/isa.h"
#include "matmul.h"
#include "qlora_native/runtime.h"

#if defined(QLORA_HAS_CUDA)
#include "cuda_device.h"
#endif

namespace qlora {
namespace {

std::atomic<const Backend*> stand_in{nullptr};

}  // namespace

void serve_host_tensors_by(const Backend* backend) { stand_in.store(backend); }

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

Device::Device(const Backend& serves, const Context& lent, const Tensor& on)
    : backend(serves), context(lent), on_(on) {
  context.allocate = &Device::allocate;
  context.matmul = &Device::matmul;
  context.lender = this;
}

void* Device::allocate(void* self, std::int64_t bytes) {
  auto& device = *static_cast<Device*>(self);
  try {
    return device.held_.emplace_back(empty_on(device.on_, bytes, ScalarType::Byte))
        .mutable_data_ptr();
  } catch (const std::exception&) {
    return nullptr;
  }
}

Status Device::matmul(void* self, const MatmulParams& params) {
  try {
    torch_matmul(static_cast<const Device*>(self)->on_, params);
    return {};
  } catch (const std::exception&) {
    return {StatusCode::device, "torch's matrix product failed"};
  }
}

Device device_of(const Tensor& t) {
  if (t.is_cpu()) {
    const Backend* replaced = stand_in.load(std::memory_order_relaxed);
    return {replaced != nullptr ? *replaced : cpu::backend(),
            {.parallel_for = torch_pool, .threads = num_threads()},
            t};
  }
#if defined(QLORA_HAS_CUDA)
  if (t.is_cuda()) return cuda_device_of(t);
  throw std::runtime_error(
      "qlora_native has no backend for this tensor's device; it serves: cpu, cuda");
#else
  throw std::runtime_error("qlora_native has no backend for this tensor's device; it serves: cpu");
#endif
}

}  // namespace torch_ops
}  // namespace qlora
