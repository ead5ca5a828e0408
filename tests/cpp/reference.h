// Matrices in fp64 that know how large the terms were which made them: what a product in fp32 may
// be off by is a multiple of the sum of its terms' magnitudes, not of the result.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "support.h"

namespace qlora::test {

struct Sum {
  double value = 0.0;
  double magnitude = 0.0;  // the sum of the terms' magnitudes
};

struct Matrix {
  std::int64_t rows, cols;
  std::vector<Sum> sums;

  Matrix(std::int64_t rows, std::int64_t cols)
      : rows(rows), cols(cols), sums(static_cast<std::size_t>(rows * cols)) {}
  Matrix(const Bytes& bytes, DType dtype, std::int64_t rows, std::int64_t cols)
      : Matrix(rows, cols) {
    for (std::int64_t i = 0; i < rows * cols; ++i) {
      const double value = get(bytes.data() + i * size_of(dtype), dtype);
      sums[static_cast<std::size_t>(i)] = {value, std::fabs(value)};
    }
  }

  Sum& at(std::int64_t row, std::int64_t col) {
    return sums[static_cast<std::size_t>(row * cols + col)];
  }
  [[nodiscard]] const Sum& at(std::int64_t row, std::int64_t col) const {
    return sums[static_cast<std::size_t>(row * cols + col)];
  }
};

inline Matrix transposed(const Matrix& m) {
  Matrix result(m.cols, m.rows);
  for (std::int64_t i = 0; i < m.rows; ++i) {
    for (std::int64_t j = 0; j < m.cols; ++j) result.at(j, i) = m.at(i, j);
  }
  return result;
}

inline Matrix operator*(const Matrix& a, const Matrix& b) {
  Matrix result(a.rows, b.cols);
  for (std::int64_t i = 0; i < a.rows; ++i) {
    for (std::int64_t k = 0; k < a.cols; ++k) {
      const Sum& left = a.at(i, k);
      for (std::int64_t j = 0; j < b.cols; ++j) {
        const Sum& right = b.at(k, j);
        result.at(i, j).value += left.value * right.value;
        result.at(i, j).magnitude += left.magnitude * right.magnitude;
      }
    }
  }
  return result;
}

inline Matrix operator*(double factor, Matrix m) {
  for (Sum& sum : m.sums) sum = {factor * sum.value, std::fabs(factor) * sum.magnitude};
  return m;
}

inline Matrix operator+(Matrix a, const Matrix& b) {
  for (std::size_t i = 0; i < a.sums.size(); ++i) {
    a.sums[i].value += b.sums[i].value;
    a.sums[i].magnitude += b.sums[i].magnitude;
  }
  return a;
}

}  // namespace qlora::test
