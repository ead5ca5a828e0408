#include "cuda_device.h"

#include <dlfcn.h>

#include <stdexcept>

#include "backend.h"

namespace qlora::torch_ops {
namespace {

// Only a CUDA build of torch has it, so it is looked up at run time: one library serves both.
// (A stream's id in the stable ABI is no cudaStream_t.)
using GetCurrentStream = AOTITorchError (*)(std::int32_t device, void** stream);

GetCurrentStream find_current_stream() {
  // Python loads torch's libraries out of each other's sight: asked for by name, not loaded anew.
  void* const torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* const where = torch_cuda != nullptr ? torch_cuda : RTLD_DEFAULT;
  return reinterpret_cast<GetCurrentStream>(dlsym(where, "aoti_torch_get_current_cuda_stream"));
}

}  // namespace

Device cuda_device_of(const Tensor& t) {
  // Again until it is found: torch may load its CUDA half after this library.
  static GetCurrentStream current_stream = nullptr;
  if (current_stream == nullptr) current_stream = find_current_stream();
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

}  // namespace qlora::torch_ops
