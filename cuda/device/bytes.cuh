// Bytes of registers, picked one by one (PTX: prmt).
#pragma once

#include <cstdint>

namespace qlora::cuda {

// prmt.b32: byte i of the result is the byte of {low, high} that the i-th nibble of the selector
// names: 0..3 of low, 4..7 of high. A nibble with its bit 3 set gives eight copies of that byte's
// sign bit instead. The selector's upper half is not read.
__device__ inline std::uint32_t permute_bytes(std::uint32_t low, std::uint32_t high,
                                              std::uint32_t selector) {
  std::uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
  return result;
}

}  // namespace qlora::cuda
