// What the kernels of the skinny products (kernels/lora_product.cuh) share: the adapters as
// operands, of a type known at run time, and where the sums go.
#pragma once

#include "kernels/lora_product.cuh"
#include "launch/lora.h"
#include "launch/operands.h"

namespace qlora::cuda {

inline LoraSums lora_sums(const LoraRuns& runs, float* sums) {
  return {.runs = runs.runs,
          .rows = runs.rows,
          .cols = runs.cols,
          .transposed = runs.transposed,
          .data = {sums, runs.sums()}};
}

inline AnyOperand<RowsOperand> any_rows(DType dtype, const void* data, std::int64_t columns,
                                        std::int64_t depth) {
  AnyOperand<RowsOperand> operand{.dtype = dtype, .fp32 = {}, .fp16 = {}, .bf16 = {}};
  if (dtype == DType::float32) operand.fp32 = rows_operand<float>(data, columns, depth);
  if (dtype == DType::float16) operand.fp16 = rows_operand<Float16>(data, columns, depth);
  if (dtype == DType::bfloat16) operand.bf16 = rows_operand<BFloat16>(data, columns, depth);
  return operand;
}

inline AnyOperand<ColumnsOperand> any_columns(DType dtype, const void* data, std::int64_t depth,
                                              std::int64_t columns) {
  AnyOperand<ColumnsOperand> operand{.dtype = dtype, .fp32 = {}, .fp16 = {}, .bf16 = {}};
  if (dtype == DType::float32) operand.fp32 = columns_operand<float>(data, depth, columns);
  if (dtype == DType::float16) operand.fp16 = columns_operand<Float16>(data, depth, columns);
  if (dtype == DType::bfloat16) operand.bf16 = columns_operand<BFloat16>(data, depth, columns);
  return operand;
}

}  // namespace qlora::cuda
