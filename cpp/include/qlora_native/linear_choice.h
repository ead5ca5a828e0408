// A way of the CUDA backend's 4-bit product that was measured to be the fastest for some cases.
#pragma once

#include <cstdint>

#include "qlora_native/types.h"

namespace qlora {

// For products with a weight [n, k] of such blocks, whose rows are at most `most_m`, and more than
// those of the choice before it for the same weight.
struct LinearChoice {
  bool forward;  // or of the input gradient
  DType dtype;   // of the activations
  bool double_quant;
  std::int64_t n, k, blocksize;
  std::int64_t most_m;
  const char* way;
};

}  // namespace qlora
