// Between fp32 and the 16-bit types, by the processor's conversions: round to nearest even, a NaN
// stays one (types.h is the definition; payloads of NaN may differ from it).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>

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

}  // namespace qlora::cuda
