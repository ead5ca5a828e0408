// Twin of cuda/device/memory.cuh: memory of the emulated runtime.
#pragma once

#include <cstdint>

#include "device/stream.cuh"
#include "qlora_native/status.h"

namespace qlora::cuda {

inline constexpr bool kDeviceAddresses = false;

inline Status allocate_device(std::int64_t bytes, void** memory) {
  return runtime().allocate(emulation::MemoryKind::device, bytes, memory);
}
inline void free_device(void* memory) { runtime().free(memory); }
inline Status allocate_pinned(std::int64_t bytes, void** memory) {
  return runtime().allocate(emulation::MemoryKind::pinned, bytes, memory);
}
inline void free_pinned(void* memory) { runtime().free(memory); }
inline Status allocate_managed(std::int64_t bytes, void** memory) {
  return runtime().allocate(emulation::MemoryKind::managed, bytes, memory);
}
inline void free_managed(void* memory) { runtime().free(memory); }

inline Status device_memory(std::int64_t* free, std::int64_t* total) {
  return runtime().device_memory(free, total);
}

inline Status keep_on_host(void* memory, std::int64_t bytes, int) {
  return runtime().advise(memory, bytes);
}

inline Status prefetch_to_device(void* memory, std::int64_t bytes, int, void* stream) {
  return runtime().prefetch(memory, bytes, true, stream);
}
inline Status prefetch_to_host(void* memory, std::int64_t bytes, void* stream) {
  return runtime().prefetch(memory, bytes, false, stream);
}

inline Status copy_to_device(void* to, const void* from, std::int64_t bytes, void* stream) {
  return runtime().copy(to, from, bytes, true, stream);
}
inline Status copy_to_host(void* to, const void* from, std::int64_t bytes, void* stream) {
  return runtime().copy(to, from, bytes, false, stream);
}

inline Status host_uses(void* memory, std::int64_t bytes) {
  return runtime().host_uses(memory, bytes);
}

inline Status concurrent_managed_access(int* yes) {
  *yes = runtime().concurrent_managed_access();
  return {};
}

}  // namespace qlora::cuda
