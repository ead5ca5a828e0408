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
//
// Of a product 8 deep of tf32, which is what an fp32 register holds but for its lower 13 bits (PTX:
// mma.m16n8k8):
//
//   A   values 0 to 3: row g, k t; row g + 8, k t; row g, k t + 4; row g + 8, k t + 4
//   B   values 0, 1: column g, k t; column g, k t + 4
#pragma once

#include <cstdint>

namespace qlora::cuda {

struct FragmentA {
  std::uint32_t word[4];
};
struct FragmentB {
  std::uint32_t word[2];
};
struct FragmentA8 {
  float value[4];
};
struct FragmentB8 {
  float value[2];
};
struct Accumulator {
  float value[4];
};

// Of each of four 8 x 8 matrices two elements, the first in the lower half.
struct Matrices {
  std::uint32_t word[4];
};

}  // namespace qlora::cuda
