// Twin of cuda/device/warp.cuh.
#pragma once

#include <cstdint>
#include <cstring>

#include "device/thread.cuh"

namespace qlora::cuda {

template <class T>
T shuffle(T value, int source_lane, const Where& where = Where::current()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  std::uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  word = machine().exchange(word, source_lane, where);
  std::memcpy(&value, &word, sizeof value);
  return value;
}

template <class T>
T shuffle_xor(T value, int lane_mask, const Where& where = Where::current()) {
  return shuffle(value, lane_index() ^ lane_mask, where);
}

inline std::uint32_t ballot(bool predicate, const Where& where = Where::current()) {
  return machine().ballot(predicate, where);
}

inline bool any_lane(bool predicate, const Where& where = Where::current()) {
  return machine().ballot(predicate, where) != 0;
}

}  // namespace qlora::cuda
