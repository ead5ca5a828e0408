// Twin of cuda/device/matrix.cuh. Each lane reads the row that it names; then the warp shares out.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

#include "device/fragments.cuh"
#include "device/shared.cuh"
#include "device/thread.cuh"

namespace qlora::cuda {

namespace detail {

struct MatrixOperands {
  std::uint16_t row[8];  // that this lane names
  Matrices result;
};

// Lane l gets of matrix m the elements (l / 4, 2 (l % 4) + {0, 1}), or those of its transpose.
template <bool kTransposed>
void share_matrices(const std::array<void*, kWarpSize>& lanes) {
  const auto of = [&](int lane) -> MatrixOperands& {
    return *static_cast<MatrixOperands*>(lanes[static_cast<std::size_t>(lane)]);
  };
  for (int lane = 0; lane < kWarpSize; ++lane) {
    for (int m = 0; m < 4; ++m) {
      std::uint32_t word = 0;
      for (int half = 0; half < 2; ++half) {
        const int major = lane / 4;
        const int minor = lane % 4 * 2 + half;
        const std::uint16_t element =
            kTransposed ? of(8 * m + minor).row[major] : of(8 * m + major).row[minor];
        word |= std::uint32_t{element} << (16 * half);
      }
      of(lane).result.word[m] = word;
    }
  }
}

template <bool kTransposed, class T>
Matrices load_matrices(Shared<T> from, int i, const Where& where) {
  static_assert(sizeof(T) == 2);
  MatrixOperands operands;
  const Vec<T, 8> row = from.template load_vec<8>(i, where);
  std::memcpy(operands.row, &row, sizeof row);
  machine().together(kTransposed ? "ldmatrix.trans" : "ldmatrix", &operands,
                     &share_matrices<kTransposed>, where);
  return operands.result;
}

}  // namespace detail

template <class T>
Matrices load_matrices(Shared<T> from, int i, const Where& where = Where::current()) {
  return detail::load_matrices<false>(from, i, where);
}

template <class T>
Matrices load_matrices_transposed(Shared<T> from, int i, const Where& where = Where::current()) {
  return detail::load_matrices<true>(from, i, where);
}

}  // namespace qlora::cuda
