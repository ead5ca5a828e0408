// The LoRA branch's own products, as their launchers have them (lora.cu).
#pragma once

#include <cstdint>

#include "qlora_native/backend.h"
#include "qlora_native/layout.h"

namespace qlora::cuda {

// Whether the kernel on the tensor cores (kernels/lora_tensor.cuh) takes the activations
// [m, columns], else the one on the CUDA cores does. A matter of the tensor and the card: the same
// for each gradient, and the bits with it.
bool lora_on_tensor_cores(DType dtype, const void* activations, std::int64_t columns);

// How the depth of a skinny product is cut into runs (kernels/lora_product.cuh): by its rows, its
// depth and the kernel alone.
struct LoraRuns {
  std::int64_t rows, cols, depth;
  bool beside;      // there are sums of one more column, kept apart
  bool transposed;  // the sums are
  bool on_tensor_cores;
  std::int64_t runs, run_depth;

  LoraRuns(std::int64_t rows, std::int64_t cols, std::int64_t depth, bool on_tensor_cores,
           bool beside = false, bool transposed = false);
  [[nodiscard]] std::int64_t sums() const { return runs * rows * (cols + (beside ? 1 : 0)); }
};

// Each fills sums (LoraSums).
Status lora_u_sums(const LoraRuns& runs, const QloraLinearParams& p, float* sums,
                   const Context& context);
Status lora_g_sums(const LoraRuns& runs, const QloraLinearBackwardParams& p, float* sums,
                   const Context& context);

// What is made of x and of dy in the backward pass; sums are null where it is not asked for.
struct LoraGradientSums {
  LoraRuns of_a;  // of dA^T, from g [M, R]
  float* a = nullptr;
  LoraRuns of_b;  // of dB, no columns where it is not asked for, and beside it of dbias
  float* b = nullptr;
};
Status lora_gradient_sums(const LoraGradientSums& sums, const QloraLinearBackwardParams& p,
                          const float* g, const Context& context);

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
