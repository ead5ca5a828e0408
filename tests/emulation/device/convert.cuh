// Twin of cuda/device/convert.cuh: the contract's own definitions.
#pragma once

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

}  // namespace qlora::cuda
