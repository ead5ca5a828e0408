// Loads of 8 x 8 matrices of 16-bit elements from shared memory, by a whole warp, into the fragment
// layout of mma (PTX: ldmatrix).
//
// Lane l names the row l % 8 of matrix l / 8 by its first element: 16 bytes, aligned to 16. The
// eight rows of a matrix are fetched at a time; they conflict where two of them have the same
// address modulo 128 bytes.
#pragma once

#include <cstdint>

#include "device/fragments.cuh"
#include "device/shared.cuh"

namespace qlora::cuda {

// ldmatrix.sync.aligned.m8n8.x4.shared.b16: lane l gets of each matrix row l / 4, columns
// 2 (l % 4) and the next.
template <class T>
__device__ Matrices load_matrices(Shared<T> from, int i) {
  static_assert(sizeof(T) == 2);
  Matrices m;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m.word[0]), "=r"(m.word[1]), "=r"(m.word[2]), "=r"(m.word[3])
               : "r"(from.address(i))
               : "memory");
  return m;
}

// The same with .trans: lane l gets of each matrix column l / 4, rows 2 (l % 4) and the next.
template <class T>
__device__ Matrices load_matrices_transposed(Shared<T> from, int i) {
  static_assert(sizeof(T) == 2);
  Matrices m;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m.word[0]), "=r"(m.word[1]), "=r"(m.word[2]), "=r"(m.word[3])
               : "r"(from.address(i))
               : "memory");
  return m;
}

}  // namespace qlora::cuda
