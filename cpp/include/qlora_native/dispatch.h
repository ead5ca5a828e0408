// From values known at run time to types and constants known at compile time:
//
//     with_type(params.dtype, [&]<class T>() { return …; });
//     with_flag(is_wide, [&]<bool kWide>() { return …; });
#pragma once

#include "qlora_native/types.h"

namespace qlora {

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

template <class Fn>
decltype(auto) with_flag(bool flag, Fn&& fn) {
  return flag ? fn.template operator()<true>() : fn.template operator()<false>();
}

}  // namespace qlora
