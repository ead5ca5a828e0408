// Twin of cuda/device/bits.cuh.
#pragma once

#include <cstdint>

#include "device/thread.cuh"

namespace qlora::cuda {

inline std::uint32_t permute_bytes(std::uint32_t low, std::uint32_t high, std::uint32_t selector) {
  const std::uint64_t bytes = std::uint64_t{high} << 32 | low;
  std::uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t which = selector >> (4 * i) & 7u;
    result |= static_cast<std::uint32_t>(bytes >> (8 * which) & 0xFFu) << (8 * i);
  }
  return result;
}

}  // namespace qlora::cuda
