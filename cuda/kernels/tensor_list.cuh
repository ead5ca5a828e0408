// Many tensors in one launch: the list travels in the kernel's parameters, which are constant
// memory on the device. Nothing is allocated or copied, so the step can be captured in a graph.
//
// The tiles of all tensors are laid end to end; a block of threads finds the tensor of its tile by
// a binary search over where each starts, the same for all its threads.
#pragma once

#include <cstdint>

#include "device/thread.cuh"
#include "kernels/tile.cuh"

namespace qlora::cuda {

// As many as keep the parameters below 32,764 bytes, what a launch may pass from sm_70 on.
inline constexpr int kMaxTensors = 320;

// Tensor has the count `n`.
template <class Tensor>
struct TensorList {
  int size;
  std::int64_t tiles;                    // of all
  std::int64_t first_tile[kMaxTensors];  // of each
  Tensor tensor[kMaxTensors];
};

struct TensorTile {
  int tensor;
  std::int64_t tile;  // within it
};

template <class Tensor>
__device__ TensorTile find_tile(const TensorList<Tensor>& list, std::int64_t tile) {
  int low = 0;
  int high = list.size;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (list.first_tile[middle] <= tile ? low : high) = middle;
  }
  return {low, tile - list.first_tile[low]};
}

}  // namespace qlora::cuda
