// Makes a Pager of a Carrier.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#include "device/launch.cuh"
#include "device/memory.cuh"
#include "paging/device_buffer.h"

namespace qlora::cuda {

inline constexpr Status kNoHostMemory{StatusCode::out_of_memory,
                                      "there is no memory left for the pager's own lists"};

template <auto kFunction, class... Arguments>
Status on_buffer(PagedBuffer* paged, Arguments... arguments) {
  auto& buffer = *static_cast<DeviceBuffer*>(paged);
  const DeviceGuard guard(buffer.device());
  if (!guard.status().ok()) return guard.status();
  try {
    return (buffer.*kFunction)(arguments...);
  } catch (const std::bad_alloc&) {
    return kNoHostMemory;
  }
}

template <class SomeCarrier>
Status open_buffer(const PagedParams& params, PagedBuffer** result) {
  const DeviceGuard guard(params.device);
  if (!guard.status().ok()) return guard.status();
  try {
    auto buffer = std::make_unique<DeviceBuffer>(std::make_unique<SomeCarrier>());
    const Status status = buffer->open(params);
    if (status.ok()) *result = buffer.release();
    return status;
  } catch (const std::bad_alloc&) {
    return kNoHostMemory;
  }
}

inline void close_buffer(PagedBuffer* paged) {
  auto* const buffer = static_cast<DeviceBuffer*>(paged);
  if (buffer == nullptr) return;
  const DeviceGuard guard(buffer->device());
  delete buffer;
}

template <class SomeCarrier>
constexpr Pager pager_of(const char* name, Status (*supports)(int device)) {
  using At = std::int64_t;
  return {
      .name = name,
      .on_device = kDeviceAddresses,
      .supports = supports,
      .open = open_buffer<SomeCarrier>,
      .close = close_buffer,
      .host_view = on_buffer<&DeviceBuffer::host_view, void**>,
      .prefetch = on_buffer<&DeviceBuffer::prefetch, At, At, void*>,
      .acquire = on_buffer<&DeviceBuffer::acquire, At, At, void*, void**>,
      .release = on_buffer<&DeviceBuffer::release, At, At, void*, bool>,
      .evict = on_buffer<&DeviceBuffer::evict, At, At, void*>,
      .settle = on_buffer<&DeviceBuffer::settle>,
      .stats = on_buffer<&DeviceBuffer::stats, PagedStats*>,
  };
}

}  // namespace qlora::cuda
