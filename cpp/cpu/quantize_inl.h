// Blockwise quantization.
#pragma once

#include "qlora_native/backend.h"

namespace qlora::cpu {

template <class V>
Status quantize_4bit(const Quantize4bitParams&, const Context&) {
  return {StatusCode::unsupported, "not written yet"};
}

template <class V>
Status quantize_8bit(const Quantize8bitParams&, const Context&) {
  return {StatusCode::unsupported, "not written yet"};
}

template <class V>
Status quantize_scales(const QuantizeScalesParams&, const Context&) {
  return {StatusCode::unsupported, "not written yet"};
}

}  // namespace qlora::cpu
