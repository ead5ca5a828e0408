// A tensor whose element type is known at run time: the optimizers take parameters and gradients of
// any type in one launch, the LoRA branch adapters of another type than x. All threads of a block
// take the same way.
#pragma once

#include <cstdint>

#include "device/global.cuh"
#include "kernels/tile.cuh"
#include "qlora_native/types.h"

namespace qlora::cuda {

template <class Void>  // void or const void
struct AnyGlobal {
  Void* data;
  DType dtype;

  template <class T>
  [[nodiscard]] __host__ __device__ Global<T> as(std::int64_t n) const {
    return {static_cast<T*>(data), n};
  }
};

__device__ inline Octet load_octet(AnyGlobal<const void> x, std::int64_t n, OctetPlace at,
                                   bool aligned) {
  switch (x.dtype) {
    case DType::float16:
      return load_octet(x.as<const Float16>(n), at, aligned);
    case DType::bfloat16:
      return load_octet(x.as<const BFloat16>(n), at, aligned);
    case DType::float32:
      break;
  }
  return load_octet(x.as<const float>(n), at, aligned);
}

__device__ inline Octet load_octet(AnyGlobal<void> x, std::int64_t n, OctetPlace at, bool aligned) {
  switch (x.dtype) {
    case DType::float16:
      return load_octet(x.as<Float16>(n), at, aligned);
    case DType::bfloat16:
      return load_octet(x.as<BFloat16>(n), at, aligned);
    case DType::float32:
      break;
  }
  return load_octet(x.as<float>(n), at, aligned);
}

__device__ inline void store_octet(AnyGlobal<void> out, std::int64_t n, OctetPlace at, bool aligned,
                                   const Octet& octet) {
  switch (out.dtype) {
    case DType::float16:
      return store_octet(out.as<Float16>(n), at, aligned, octet);
    case DType::bfloat16:
      return store_octet(out.as<BFloat16>(n), at, aligned, octet);
    case DType::float32:
      break;
  }
  store_octet(out.as<float>(n), at, aligned, octet);
}

// One element of n.
__device__ inline float load_value(AnyGlobal<const void> x, std::int64_t n, std::int64_t i) {
  if (x.dtype == DType::float16) return widen(x.as<const Float16>(n).load(i));
  if (x.dtype == DType::bfloat16) return widen(x.as<const BFloat16>(n).load(i));
  return x.as<const float>(n).load(i);
}

__device__ inline void store_value(AnyGlobal<void> out, std::int64_t n, std::int64_t i,
                                   float value) {
  if (out.dtype == DType::float16) return out.as<Float16>(n).store(i, narrow<Float16>(value));
  if (out.dtype == DType::bfloat16) return out.as<BFloat16>(n).store(i, narrow<BFloat16>(value));
  out.as<float>(n).store(i, value);
}

// What a value is after it was stored as that type.
__device__ inline float rounded(DType dtype, float value) {
  if (dtype == DType::float16) return widen(narrow<Float16>(value));
  if (dtype == DType::bfloat16) return widen(narrow<BFloat16>(value));
  return value;
}

}  // namespace qlora::cuda
