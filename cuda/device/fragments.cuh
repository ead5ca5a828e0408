// What a lane holds of the matrices of mma.cuh, and of those that matrix.cuh loads for it.
//
//   D [16, 8] += A [16, 16] B [16, 8]        16-bit elements, sums in fp32
//
// With group g = lane / 4 and t = lane % 4, two elements a word, the first in the lower half (PTX:
// mma.m16n8k16):
//
//   A   word 0: row g,     k 2t, 2t + 1          word 2: row g,     k 2t + 8, 2t + 9
//       word 1: row g + 8, k 2t, 2t + 1          word 3: row g + 8, k 2t + 8, 2t + 9
//   B   word 0: column g,  k 2t, 2t + 1          word 1: column g,  k 2t + 8, 2t + 9
//   D   value 0, 1: row g, columns 2t, 2t + 1    value 2, 3: row g + 8, the same columns
#pragma once

#include <cstdint>

namespace qlora::cuda {

struct FragmentA {
  std::uint32_t word[4];
};
struct FragmentB {
  std::uint32_t word[2];
};
struct Accumulator {
  float value[4];
};

// Of each of four 8 x 8 matrices two elements, the first in the lower half.
struct Matrices {
  std::uint32_t word[4];
};

}  // namespace qlora::cuda
