// How wgmma finds its operands in shared memory: matrix descriptors with the swizzle of 128 bytes
// (PTX: Asynchronous Warpgroup Level Matrix Shared Memory Layout), and who reads them.
//
// A descriptor has a start address, a leading and a stride distance, each in units of 16 bytes.
// With row, column in the tile as it lies (rows of 128 bytes), the bytes stand at
//
//   depth along rows    start + row / 8 * stride + row % 8 * 128 + depth * 2       row: M or N
//   depth across rows   start + column / 64 * leading + column % 64 * 2
//                             + depth / 8 * stride + depth % 8 * 128               column: M or N
//
// of which bits 4 to 6 are then exchanged by bits 7 to 9 (the address's, whatever the tile's).
#pragma once

#include <array>
#include <cstdint>
#include <source_location>

#include "clock.h"
#include "shadow.h"

namespace emulation {

inline constexpr int kOperandDepth = 16;

std::uint64_t descriptor(std::uint32_t address, int leading_bytes, int stride_bytes);

// The tensor cores of the running thread's warpgroup, in a product that it starts now. A warp's
// part knows what was fenced by, or handed on fenced to, all of its lanes.
class ReadingWarpgroup {
 public:
  ReadingWarpgroup();
  [[nodiscard]] Actor warp(int i) const { return {moments_[index(i)], known_[index(i)]}; }

 private:
  static std::size_t index(int i) { return static_cast<std::size_t>(i); }
  std::array<Moment, 4> moments_;
  std::array<Clock, 4> known_;
};

// Elements of 16 bits: out [rows][16], rows of M or N. By all warps, or 16 rows by each.
void read_operand(std::uint64_t descriptor, bool depth_across_rows, int rows, bool by_all,
                  const ReadingWarpgroup& readers, const std::source_location& where,
                  std::uint16_t* out);

}  // namespace emulation
