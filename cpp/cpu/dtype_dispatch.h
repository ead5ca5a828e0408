// From a DType at run time to a storage type at compile time.
#pragma once

#include "qlora_native/types.h"

namespace qlora::cpu {

// body.template operator()<T>() with the type that stores `dtype`.
template <class Body>
void dispatch_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::float32:
      return body.template operator()<float>();
    case DType::float16:
      return body.template operator()<Float16>();
    case DType::bfloat16:
      return body.template operator()<BFloat16>();
  }
}

}  // namespace qlora::cpu
