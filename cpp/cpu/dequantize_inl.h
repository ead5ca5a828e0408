// Blockwise dequantization.
#pragma once

#include "qlora_native/backend.h"

namespace qlora::cpu {

template <class V>
Status dequantize_4bit(const Dequantize4bitParams&, const Context&) {
  return {StatusCode::unsupported, "not written yet"};
}

template <class V>
Status dequantize_8bit(const Dequantize8bitParams&, const Context&) {
  return {StatusCode::unsupported, "not written yet"};
}

template <class V>
Status dequantize_scales(const DequantizeScalesParams&, const Context&) {
  return {StatusCode::unsupported, "not written yet"};
}

}  // namespace qlora::cpu
