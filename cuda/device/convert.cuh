// Between fp32 and the 16-bit types, by the processor's conversions: round to nearest even, a NaN
// stays one (types.h is the definition; payloads of NaN may differ from it).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cstdint>

#include "qlora_native/types.h"

namespace qlora::cuda {

__device__ inline float widen(float value) { return value; }
// cvt.f32.f16
__device__ inline float widen(Float16 value) { return __half2float(std::bit_cast<__half>(value)); }
__device__ inline float widen(BFloat16 value) {
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}

template <class T>
__device__ T narrow(float value);
template <>
__device__ inline float narrow<float>(float value) {
  return value;
}
// cvt.rn.f16.f32
template <>
__device__ inline Float16 narrow<Float16>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}
// cvt.rn.bf16.f32, and a few integer instructions before sm_80
template <>
__device__ inline BFloat16 narrow<BFloat16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}

namespace detail {

// CUDA's pairs are no types that std::bit_cast takes.
template <class Pair>
__device__ std::uint32_t word_of(const Pair& pair) {
  static_assert(sizeof(Pair) == sizeof(std::uint32_t));
  std::uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

}  // namespace detail

// Two at a time into a word, the first in the lower half.
template <class T>
__device__ std::uint32_t narrow_pair(float first, float second);
// cvt.rn.f16x2.f32
template <>
__device__ inline std::uint32_t narrow_pair<Float16>(float first, float second) {
  return detail::word_of(__floats2half2_rn(first, second));
}
// cvt.rn.bf16x2.f32
template <>
__device__ inline std::uint32_t narrow_pair<BFloat16>(float first, float second) {
  return detail::word_of(__floats2bfloat162_rn(first, second));
}

// tf32 is fp32 without the lower 13 bits of the mantissa. To the nearest, a tie away from 0: what
// cvt.rna.tf32.f32 does in twice as many instructions, but for NaN, which may become 0 here.
__device__ inline float round_tf32(float value) {
  return __uint_as_float((__float_as_uint(value) + 0x1000u) & ~0x1FFFu);
}
// Towards 0; a NaN of this processor's stays one.
__device__ inline float truncate_tf32(float value) {
  return __uint_as_float(__float_as_uint(value) & ~0x1FFFu);
}

}  // namespace qlora::cuda
