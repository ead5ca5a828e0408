// Shares the values of many tensors out over the caller's threads: what an optimizer's step does.
//
// The tensors are laid end to end in blocks of kOptimizerBlocksize values (the last block of each
// may be short) and the blocks are split evenly, so that four hundred small tensors keep the
// threads as busy as one large one. A span never cuts a block, and blocks never see each other: the
// bits that come out do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "qlora_native/backend.h"
#include "qlora_native/layout.h"

namespace qlora::cpu {

// Below this many blocks (16,384 values) a second thread costs more than it brings.
inline constexpr std::int64_t kMinBlocksPerThread = 64;

// Calls span(tensor, begin, end) with value ranges that cover every tensor once; `begin` is a
// multiple of kOptimizerBlocksize. Tensor is a struct with the count `n`.
template <class Tensor, class Span>
void for_each_span(const Tensor* tensors, std::int64_t n_tensors, const Context& context,
                   const Span& span) {
  std::int64_t blocks = 0;
  for (std::int64_t i = 0; i < n_tensors; ++i) {
    blocks += n_blocks(tensors[i].n, kOptimizerBlocksize);
  }
  const auto body = [&](std::int64_t begin, std::int64_t end) {
    std::int64_t first = 0;  // block of all, at which tensor i starts
    for (std::int64_t i = 0; i < n_tensors && first < end; ++i) {
      const Tensor& tensor = tensors[i];
      const std::int64_t last = first + n_blocks(tensor.n, kOptimizerBlocksize);
      if (last > begin) {
        const std::int64_t from = (begin > first ? begin - first : 0) * kOptimizerBlocksize;
        const std::int64_t to = (end < last ? end - first : last - first) * kOptimizerBlocksize;
        span(tensor, from, to < tensor.n ? to : tensor.n);
      }
      first = last;
    }
  };
  parallel_for(context, blocks, kMinBlocksPerThread, body);
}

}  // namespace qlora::cpu
