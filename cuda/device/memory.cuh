// Memory that the host asks for, of the current device, and how it moves: device memory, pinned
// memory of the host, and managed memory, whose pages are on either side.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "device/stream.cuh"
#include "qlora_native/status.h"

namespace qlora::cuda {

// Whether the host can follow no address that kernels can.
inline constexpr bool kDeviceAddresses = true;

namespace detail {

inline std::size_t size(std::int64_t bytes) { return static_cast<std::size_t>(bytes); }

}  // namespace detail

inline Status allocate_device(std::int64_t bytes, void** memory) {
  return called(cudaMalloc(memory, detail::size(bytes)));
}
inline void free_device(void* memory) { static_cast<void>(cudaFree(memory)); }

// Of the host, that copies reach without its help: for every device.
inline Status allocate_pinned(std::int64_t bytes, void** memory) {
  return called(cudaHostAlloc(memory, detail::size(bytes), cudaHostAllocPortable));
}
inline void free_pinned(void* memory) { static_cast<void>(cudaFreeHost(memory)); }

inline Status allocate_managed(std::int64_t bytes, void** memory) {
  return called(cudaMallocManaged(memory, detail::size(bytes), cudaMemAttachGlobal));
}
inline void free_managed(void* memory) { static_cast<void>(cudaFree(memory)); }

inline Status device_memory(std::int64_t* free, std::int64_t* total) {
  std::size_t free_bytes = 0, total_bytes = 0;
  const cudaError_t error = cudaMemGetInfo(&free_bytes, &total_bytes);
  *free = static_cast<std::int64_t>(free_bytes);
  *total = static_cast<std::int64_t>(total_bytes);
  return called(error);
}

// CUDA 13 names a place where 12 has a number.
#if CUDART_VERSION >= 13000
inline cudaMemLocation place_of(int device) {
  cudaMemLocation place{};
  place.type = device == cudaCpuDeviceId ? cudaMemLocationTypeHost : cudaMemLocationTypeDevice;
  place.id = device == cudaCpuDeviceId ? 0 : device;
  return place;
}
#else
inline int place_of(int device) { return device; }
#endif

// Managed memory that is at home with the host: what a kernel of `device` touches there it reads
// over the link, without a page moving.
inline Status keep_on_host(void* memory, std::int64_t bytes, int device) {
  const cudaError_t error = cudaMemAdvise(
      memory, detail::size(bytes), cudaMemAdviseSetPreferredLocation, place_of(cudaCpuDeviceId));
  if (error != cudaSuccess) return called(error);
  return called(
      cudaMemAdvise(memory, detail::size(bytes), cudaMemAdviseSetAccessedBy, place_of(device)));
}

namespace detail {

inline Status prefetch(void* memory, std::int64_t bytes, int device, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
#if CUDART_VERSION >= 13000
  return called(cudaMemPrefetchAsync(memory, size(bytes), place_of(device), 0, on));
#else
  return called(cudaMemPrefetchAsync(memory, size(bytes), device, on));
#endif
}

}  // namespace detail

// Moves managed memory, in the stream's order, by whole pages.
inline Status prefetch_to_device(void* memory, std::int64_t bytes, int device, void* stream) {
  return detail::prefetch(memory, bytes, device, stream);
}
inline Status prefetch_to_host(void* memory, std::int64_t bytes, void* stream) {
  return detail::prefetch(memory, bytes, cudaCpuDeviceId, stream);
}

// Between pinned and device memory, in the stream's order.
inline Status copy_to_device(void* to, const void* from, std::int64_t bytes, void* stream) {
  return called(cudaMemcpyAsync(to, from, detail::size(bytes), cudaMemcpyHostToDevice,
                                static_cast<cudaStream_t>(stream)));
}
inline Status copy_to_host(void* to, const void* from, std::int64_t bytes, void* stream) {
  return called(cudaMemcpyAsync(to, from, detail::size(bytes), cudaMemcpyDeviceToHost,
                                static_cast<cudaStream_t>(stream)));
}

// The host is about to read and write pinned or managed memory: nothing here. The emulator's twin
// of this file checks that all work on it is known to be over.
inline Status host_uses(void*, std::int64_t) { return {}; }

// Whether host and device may touch managed memory at the same time, and it can be prefetched.
inline Status concurrent_managed_access(int* yes) {
  return attribute(cudaDevAttrConcurrentManagedAccess, yes);
}

}  // namespace qlora::cuda
