// The LoRA branch's own products, as their launchers have them (lora.cu).
#pragma once

#include <cstdint>

#include "qlora_native/backend.h"
#include "qlora_native/layout.h"

namespace qlora::cuda {

// How the depth of a skinny product is cut into runs (kernels/lora_product.cuh): by its rows and
// its depth alone.
struct LoraRuns {
  std::int64_t rows, cols, depth;
  std::int64_t runs, run_depth;

  LoraRuns(std::int64_t rows, std::int64_t cols, std::int64_t depth);
  [[nodiscard]] std::int64_t sums() const { return runs * rows * cols; }
};

// Each fills sums [runs, rows, cols].
Status lora_u_sums(const LoraRuns& runs, const QloraLinearParams& p, float* sums,
                   const Context& context);
Status lora_g_sums(const LoraRuns& runs, const QloraLinearBackwardParams& p, float* sums,
                   const Context& context);
// Of dA^T, from g [M, R].
Status lora_grad_a_sums(const LoraRuns& runs, const QloraLinearBackwardParams& p, const float* g,
                        float* sums, const Context& context);
// Of dB, r columns, and of dbias, a column after them; r is 0 where dB is not asked for.
Status lora_grad_b_sums(const LoraRuns& runs, const QloraLinearBackwardParams& p, std::int64_t r,
                        float* sums, const Context& context);

// A matrix as it lies in memory, or the sums of runs of one.
struct LoraSource {
  DType dtype;
  const void* data;
  std::int64_t size;  // elements that may be read
  std::int64_t row_stride, col_stride;
  std::int64_t runs = 1, run_stride = 0;
};

struct LoraTarget {
  std::int64_t rows, cols;
  float factor = 1.0f;
  DType out_dtype = DType::float32;
  void* out = nullptr;  // [rows, cols], or null
  float operand_factor = 1.0f;
  DType operand_dtype = DType::float32;
  void* operand = nullptr;  // [rows, padded], or null
  std::int64_t padded = 0;
  int parts = 1;
  int low_part = -1;  // the part that has what rounding took away; -1: none
};

// kernels/lora_sums.cuh
Status lora_finish(const LoraSource& source, const LoraTarget& target, const Context& context);

}  // namespace qlora::cuda
