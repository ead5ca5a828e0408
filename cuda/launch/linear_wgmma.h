// Which products linear_wgmma and backward_input_wgmma take.
#pragma once

#include <cstdint>

#include "qlora_native/params.h"

namespace qlora::cuda {

// What tiles_serve takes (linear_tiles.h), on an sm_90 card, in a build that has code for sm_90a.
[[nodiscard]] bool wgmma_serves(DType dtype, std::int64_t depth, const Weight4bit& weight,
                                const void* activations);

// Whether the tiles of a result [m, columns] are at least half as many as the multiprocessors.
[[nodiscard]] bool wgmma_fills(std::int64_t m, std::int64_t columns);

}  // namespace qlora::cuda
