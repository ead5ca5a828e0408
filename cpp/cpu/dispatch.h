// From an element type known at run time to one known at compile time:
//
//     with_type(params.dtype, [&]<class T>() { return kernel<V, T>(params); });
#pragma once

#include "qlora_native/types.h"

namespace qlora::cpu {

template <class Fn>
decltype(auto) with_type(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::float16:
      return fn.template operator()<Float16>();
    case DType::bfloat16:
      return fn.template operator()<BFloat16>();
    case DType::float32:
      break;
  }
  return fn.template operator()<float>();
}

}  // namespace qlora::cpu
