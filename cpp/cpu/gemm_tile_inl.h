// The innermost product: a kRows x (kVecs vectors) tile of C in registers over a run of depth
// steps.
//
//   C[i][j] += sum over s of A[i][s] * panel[s][j]
//
// A is row-major with a fixed stride, so that all its rows are one base register and constants, and
// one element of it is broadcast straight from memory into the multiplication; the panel is read as
// contiguous vectors. What limits it is the multiply-add units: per step kRows * kVecs of them
// against kRows broadcasts and kVecs loads. Every kRunSteps the registers are added to C and start
// at zero again: one long sum loses bits that sums of sums keep (at K = 256 its error was 2.3 times
// that of MKL's product). Each element's order of additions depends on nothing but the depth, so
// tiles, threads and edges do not change bits.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "gemm_shape.h"

namespace qlora::cpu {

enum class Product : std::uint8_t {
  fp32,        // a step is one depth: fp32 times fp32
  bf16_pairs,  // a step is two depths: pairs of bf16, products summed in fp32
};

// One run: sum = A * panel over `steps`, in registers.
template <class V, Product kProduct, int kRows, int kVecs>
[[gnu::always_inline]] inline void sum_run(std::int64_t steps, const float* a, const float* panel,
                                           typename V::F (&sum)[kRows][kVecs]) {
  constexpr std::int64_t kStride = Gemm<V>::kOperandStride;
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) sum[i][j] = V::zero();
  }
  for (std::int64_t s = 0; s < steps; ++s) {
    const float* at = panel + s * Gemm<V>::kPanelCols;
    if constexpr (kProduct == Product::fp32) {
      typename V::F right[kVecs];
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) right[j] = V::load(at + j * V::kWidth);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const auto left = V::set1(a[i * kStride + s]);
#pragma GCC unroll 2
        for (int j = 0; j < kVecs; ++j) sum[i][j] = V::fma(left, right[j], sum[i][j]);
      }
    } else {
      typename V::I right[kVecs];
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) right[j] = V::load_int(at + j * V::kWidth);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const auto left = V::set1_int(std::bit_cast<std::int32_t>(a[i * kStride + s]));
#pragma GCC unroll 2
        for (int j = 0; j < kVecs; ++j) sum[i][j] = V::dot_pairs(sum[i][j], left, right[j]);
      }
    }
  }
}

template <class V, Product kProduct, int kRows, int kVecs>
void gemm_tile(std::int64_t steps, const float* a, const float* panel, float* c,
               std::int64_t c_stride, bool accumulate) {
  constexpr std::int64_t kRun = kVecs == 1 ? Gemm<V>::kSlimRunSteps : Gemm<V>::kRunSteps;
  for (int i = 0; accumulate && i < kRows; ++i) {
    for (int j = 0; j < kVecs; ++j) V::prefetch(c + i * c_stride + j * V::kWidth);
  }
  for (std::int64_t s = 0; s < steps; s += kRun) {
    typename V::F sum[kRows][kVecs];
    sum_run<V, kProduct>(steps - s < kRun ? steps - s : kRun, a + s,
                         panel + s * Gemm<V>::kPanelCols, sum);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) {
        float* out = c + i * c_stride + j * V::kWidth;
        V::store(out, accumulate ? V::add(V::load(out), sum[i][j]) : sum[i][j]);
      }
    }
    accumulate = true;
  }
}

// From the number of rows at run time to the tile of that height, 1..Gemm<V>::kRows.
template <class V, Product kProduct, int kVecs, int kRows = Gemm<V>::kRows>
void gemm_tile_rows(std::int64_t rows, std::int64_t steps, const float* a, const float* panel,
                    float* c, std::int64_t c_stride, bool accumulate) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return gemm_tile_rows<V, kProduct, kVecs, kRows - 1>(rows, steps, a, panel, c, c_stride,
                                                           accumulate);
    }
  }
  gemm_tile<V, kProduct, kRows, kVecs>(steps, a, panel, c, c_stride, accumulate);
}

}  // namespace qlora::cpu
