// What linear_few_rows can compute, for the choice among the ways (linear_paths.h).
#pragma once

#include <cstdint>

#include "qlora_native/params.h"

namespace qlora::cuda {

// 16-bit activations, M <= 64, rows of whole 16-byte pieces of codes (K a multiple of 32; blocks
// may straddle rows), W and x aligned to 16 bytes, a card whose blocks of threads can have the
// shared memory (sm_80 and later; those with 99 kB: M <= 28) and, above M = 32, blocksize and K
// multiples of 64.
bool linear_few_rows_serves(DType dtype, std::int64_t m, const Weight4bit& weight, const void* x);

}  // namespace qlora::cuda
