#include "cuda_device.h"

#include <stdexcept>

#include "backend.h"
#include "launch/linear_paths.h"
#include "qlora_native/runtime.h"
#include "torch_symbol.h"

namespace qlora {
namespace {

cuda::Direction direction(bool forward) {
  return forward ? cuda::Direction::forward : cuda::Direction::backward_input;
}

}  // namespace

const char* cuda_linear_way(bool forward, int i) { return cuda::way_name(direction(forward), i); }

bool force_cuda_linear(bool forward, const char* name) {
  return cuda::force_way(direction(forward), name);
}

const char* last_cuda_linear_way(bool forward) { return cuda::last_way(direction(forward)); }

bool set_cuda_linear_choices(int device, std::span<const LinearChoice> choices) {
  return cuda::set_choices(device, choices);
}

namespace torch_ops {
namespace {

// Only a CUDA build of torch has it.
// (A stream's id in the stable ABI is no cudaStream_t.)
using GetCurrentStream = AOTITorchError (*)(std::int32_t device, void** stream);

}  // namespace

Device cuda_device_of(const Tensor& t) {
  static GetCurrentStream found = nullptr;
  const GetCurrentStream current_stream =
      torch_function(found, "libtorch_cuda.so", "aoti_torch_get_current_cuda_stream");
  if (current_stream == nullptr) {
    throw std::runtime_error(
        "qlora_native: the tensor is on CUDA, but this torch does not tell its current stream "
        "(aoti_torch_get_current_cuda_stream was not found); it needs a CUDA build of torch >= "
        "2.10");
  }
  Context context;
  context.device = static_cast<int>(t.get_device_index());
  STABLE_TORCH_ERROR_CODE_CHECK(current_stream(context.device, &context.stream));
  return {cuda::backend(), context, t};
}

}  // namespace torch_ops
}  // namespace qlora
