// Which products linear_tiles and backward_input_tiles take.
#pragma once

#include <cstdint>

#include "qlora_native/params.h"

namespace qlora::cuda {

// sm_80 and later; 16-bit activations [M, depth], x or grad_out, of rows that are whole, aligned
// 16-byte pieces (K % 8 in the forward product, N % 8 in the input gradient); rows of the weight
// that are whole, aligned 16-byte pieces of codes (K % 32). Any M, N, blocksize, bias and output.
[[nodiscard]] bool tiles_serve(DType dtype, std::int64_t depth, const Weight4bit& weight,
                               const void* activations);

}  // namespace qlora::cuda
