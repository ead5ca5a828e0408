// Bytes of words, put together anew by one instruction.
#pragma once

#include <cstdint>

namespace qlora::cuda {

// prmt.b32: byte i of the result is the byte of (low, high), eight of them counted from low's
// lowest, that nibble i of the selector names.
__device__ inline std::uint32_t permute_bytes(std::uint32_t low, std::uint32_t high,
                                              std::uint32_t selector) {
  return __byte_perm(low, high, selector);
}

}  // namespace qlora::cuda
