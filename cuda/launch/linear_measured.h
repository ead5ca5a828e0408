// The choices among the ways of the 4-bit product that were measured on a device. They come before
// those of the table in linear_paths.cu.
#pragma once

#include <compare>
#include <cstdint>
#include <vector>

#include "launch/linear_paths.h"

namespace qlora::cuda {

// What a measured choice depends on. In order: those of one weight stand together, by their m.
struct MeasuredCase {
  int device;
  Direction direction;
  DType dtype;
  bool double_quant;
  std::int64_t n, k, blocksize, m;

  auto operator<=>(const MeasuredCase&) const = default;
};

struct MeasuredWay {
  MeasuredCase most;  // with the most rows for which it holds
  int way;            // its index
};

inline constexpr int kNotMeasured = -1;

// A binary search; it neither allocates nor locks.
int measured_way(const MeasuredCase& asked);

// In place of all that the device had.
void set_measured_ways(int device, const std::vector<MeasuredWay>& ways);

}  // namespace qlora::cuda
