// The 4-bit linear layer.
#pragma once

#include "qlora_native/backend.h"

namespace qlora::cpu {

template <class V>
Status linear_4bit(const LinearParams&, const Context&) {
  return {StatusCode::unsupported, "not written yet"};
}

template <class V>
Status linear_4bit_backward_input(const LinearBackwardInputParams&, const Context&) {
  return {StatusCode::unsupported, "not written yet"};
}

template <class V>
Status qlora_linear(const QloraLinearParams&, const Context&) {
  return {StatusCode::unsupported, "not written yet"};
}

template <class V>
Status qlora_linear_backward(const QloraLinearBackwardParams&, const Context&) {
  return {StatusCode::unsupported, "not written yet"};
}

}  // namespace qlora::cpu
