// Twin of cuda/device/launch.cuh: runs the kernel on the emulated machine, at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <utility>

#include "device/thread.cuh"
#include "machine.h"
#include "qlora_native/status.h"
#include "runtime.h"
#include "shadow.h"

namespace qlora::cuda {

inline constexpr const char* kBackendName = "cuda-emulated";

struct Launch {
  std::int64_t grid;
  int block;
  std::size_t dynamic_shared = 0;
  void* stream = nullptr;
};

// A kernel's fault becomes the Status; its text stays until the next one of this thread.
template <class... Parameters, class... Arguments>
Status launch(void (*kernel)(Parameters...), const Launch& config, const Arguments&... arguments) {
  if (config.grid == 0) return {};
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  auto& runtime = emulation::Runtime::instance();
  auto fault = runtime.begin_kernel(config.stream);
  if (!fault) {
    fault = machine().run({config.grid, config.block, config.dynamic_shared},
                          [&] { kernel(arguments...); });
    auto unordered = runtime.end_kernel();
    if (!fault) fault = std::move(unordered);
  }
  if (!fault) return {};
  static thread_local std::string text;
  text = fault->text;
  return {StatusCode::device, text.c_str()};
}

inline Status multiprocessors(int* count) {
  *count = machine().multiprocessors();
  return {};
}

inline Status largest_shared_memory(int* bytes) {
  *bytes = static_cast<int>(emulation::DynamicMemory::kBytes);
  return {};
}

inline Status l2_bytes(int* bytes) {
  *bytes = emulation::kL2Bytes;
  return {};
}

// The card that the machine pretends to be.
inline Status architecture(int* number) {
  *number = machine().architecture();
  return {};
}

// There is one emulated device.
class DeviceGuard {
 public:
  explicit DeviceGuard(int) {}
  [[nodiscard]] Status status() const { return {}; }
};

}  // namespace qlora::cuda
