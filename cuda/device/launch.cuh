// The host's side of a launch: the only place that starts a kernel, and what it asks the device.
// (stream.cuh and memory.cuh have the other words of the runtime.)
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "qlora_native/status.h"

namespace qlora::cuda {

inline constexpr const char* kBackendName = "cuda";

// A launch may have this many bytes of dynamic shared memory, and on request what the card has.
inline constexpr std::size_t kSharedWithoutRequest = 48 * 1024;

struct Launch {
  std::int64_t grid;  // blocks; 0: nothing is launched
  int block;          // threads
  std::size_t dynamic_shared = 0;
  void* stream = nullptr;
};

inline Status to_status(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return {};
    case cudaErrorMemoryAllocation:
      return {StatusCode::out_of_memory, cudaGetErrorString(error)};
    case cudaErrorNoKernelImageForDevice:
      return {StatusCode::unsupported,
              "this build has no kernels for this GPU's architecture; "
              "build_info()['cuda_architectures'] lists those it has"};
    default:
      return {StatusCode::device, cudaGetErrorString(error)};
  }
}

// kernel(arguments...) on config.stream of the current device. Asynchronous: an error that shows
// itself while the kernel runs is reported by a later call, as everywhere in CUDA.
template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), const Launch& config, const Arguments&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 32764, "what a launch may pass from sm_70 on");
  if (config.grid == 0) return {};
  cudaError_t error = cudaSuccess;
  if (config.dynamic_shared > kSharedWithoutRequest) {  // of this kernel on the current device
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(config.dynamic_shared));
  }
  cudaLaunchConfig_t settings{};
  settings.gridDim = dim3(static_cast<unsigned>(config.grid));
  settings.blockDim = dim3(static_cast<unsigned>(config.block));
  settings.dynamicSmemBytes = config.dynamic_shared;
  settings.stream = static_cast<cudaStream_t>(config.stream);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&settings, kernel, arguments...);
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());  // not left for another's call
  return to_status(error);
}

// ---- of the current device ----

inline Status attribute(cudaDeviceAttr which, int* value) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return to_status(error);
  return to_status(cudaDeviceGetAttribute(value, which, device));
}

// Streaming multiprocessors.
inline Status multiprocessors(int* count) {
  return attribute(cudaDevAttrMultiProcessorCount, count);
}

inline Status l2_bytes(int* bytes) { return attribute(cudaDevAttrL2CacheSize, bytes); }

// The compute capability as one number: 75, 80, 86, 89, 90, 100, 120.
inline Status architecture(int* number) {
  int major = 0, minor = 0;
  if (const Status status = attribute(cudaDevAttrComputeCapabilityMajor, &major); !status.ok()) {
    return status;
  }
  const Status status = attribute(cudaDevAttrComputeCapabilityMinor, &minor);
  *number = 10 * major + minor;
  return status;
}

// The most shared memory that a block of threads may have, on request.
inline Status largest_shared_memory(int* bytes) {
  return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, bytes);
}

// Makes a device the current one, and the one before it again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    cudaError_t error = cudaGetDevice(&before_);
    if (error == cudaSuccess && before_ != device) {
      error = cudaSetDevice(device);
      changed_ = error == cudaSuccess;
    }
    status_ = to_status(error);
  }
  ~DeviceGuard() {
    if (changed_) static_cast<void>(cudaSetDevice(before_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  [[nodiscard]] Status status() const { return status_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  Status status_;
};

}  // namespace qlora::cuda
