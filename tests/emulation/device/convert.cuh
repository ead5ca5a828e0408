// Twin of cuda/device/convert.cuh: the contract's own definitions.
#pragma once

#include <bit>
#include <cstdint>

#include "device/thread.cuh"
#include "qlora_native/types.h"

namespace qlora::cuda {

template <class T>
float widen(T value) {
  return to_float(value);
}

template <class T>
T narrow(float value) {
  return from_float<T>(value);
}

template <class T>
std::uint32_t narrow_pair(float first, float second) {
  return from_float<T>(first).bits | std::uint32_t{from_float<T>(second).bits} << 16;
}

inline float round_tf32(float value) {
  return std::bit_cast<float>((std::bit_cast<std::uint32_t>(value) + 0x1000u) & ~0x1FFFu);
}
inline float truncate_tf32(float value) {
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(value) & ~0x1FFFu);
}

}  // namespace qlora::cuda
