// Hands many tensors to a kernel, as many at a launch as its parameters hold (tensor_list.cuh).
#pragma once

#include "kernels/tensor_list.cuh"
#include "launch/tiles.h"

namespace qlora::cuda {

// `convert` makes a device tensor of tensors[i]. Empty tensors are left out.
template <class Arguments, class Rule, class Tensor, class Convert>
Status launch_tensor_lists(void (*kernel)(Arguments), const Rule& rule, const Tensor* tensors,
                           std::int64_t n_tensors, void* stream, const Convert& convert) {
  Arguments arguments{};
  arguments.rule = rule;
  auto& list = arguments.list;
  const auto flush = [&]() -> Status {
    const Status status = launch_tiles(kernel, list.tiles, arguments, stream);
    list.size = 0;
    list.tiles = 0;
    return status;
  };
  for (std::int64_t i = 0; i < n_tensors; ++i) {
    if (tensors[i].n == 0) continue;
    if (list.size == kMaxTensors) {
      if (const Status status = flush(); !status.ok()) return status;
    }
    list.first_tile[list.size] = list.tiles;
    list.tensor[list.size] = convert(tensors[i]);
    list.tiles += n_tiles(tensors[i].n);
    ++list.size;
  }
  return flush();
}

}  // namespace qlora::cuda
