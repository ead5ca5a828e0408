// Exchange between the 32 lanes of a warp. All of them take part in every call.
#pragma once

#include <cstdint>

#include "device/thread.cuh"

namespace qlora::cuda {

inline constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// shfl.sync.bfly: the value of the lane whose index differs in the bits of lane_mask.
template <class T>
__device__ T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(kAllLanes, value, lane_mask);
}

// shfl.sync.idx: the value of that lane.
template <class T>
__device__ T shuffle(T value, int source_lane) {
  return __shfl_sync(kAllLanes, value, source_lane);
}

// vote.sync.ballot: bit i is lane i's predicate.
__device__ inline std::uint32_t ballot(bool predicate) {
  return __ballot_sync(kAllLanes, predicate);
}

// vote.sync.any
__device__ inline bool any_lane(bool predicate) { return __any_sync(kAllLanes, predicate) != 0; }

}  // namespace qlora::cuda
