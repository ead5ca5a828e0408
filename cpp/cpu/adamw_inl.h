// AdamW.
#pragma once

#include "qlora_native/backend.h"

namespace qlora::cpu {

template <class V>
Status adamw_step(const AdamwStepParams&, const Context&) {
  return {StatusCode::unsupported, "not written yet"};
}

template <class V>
Status adamw_8bit_step(const Adamw8bitStepParams&, const Context&) {
  return {StatusCode::unsupported, "not written yet"};
}

}  // namespace qlora::cpu
