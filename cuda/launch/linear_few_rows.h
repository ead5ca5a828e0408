// What linear_few_rows can compute, for the choice among the ways (linear_paths.h).
#pragma once

#include "qlora_native/params.h"
#include "qlora_native/status.h"

namespace qlora::cuda {

// Ok, or why not: 16-bit activations, M <= 64, rows of whole 16-byte pieces of codes (K a multiple
// of 32; blocks may straddle rows), W and x aligned to 16 bytes, a card whose blocks of threads can
// have the shared memory (sm_80 and later; those with 99 kB: M <= 28) and, above M = 32, blocksize
// and K multiples of 64.
Status linear_few_rows_serves(const LinearParams& p);

}  // namespace qlora::cuda
