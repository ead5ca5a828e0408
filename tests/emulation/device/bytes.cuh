// Twin of cuda/device/bytes.cuh.
#pragma once

#include <cstdint>

namespace qlora::cuda {

inline std::uint32_t permute_bytes(std::uint32_t low, std::uint32_t high, std::uint32_t selector) {
  const std::uint64_t bytes = std::uint64_t{high} << 32 | low;
  std::uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t nibble = selector >> (4 * i) & 0xFu;
    std::uint32_t byte = static_cast<std::uint32_t>(bytes >> (8 * (nibble & 7u))) & 0xFFu;
    if (nibble >= 8) byte = byte >= 0x80u ? 0xFFu : 0u;
    result |= byte << (8 * i);
  }
  return result;
}

}  // namespace qlora::cuda
