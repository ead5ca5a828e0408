// Matrices in memory as operands of a product on the CUDA cores (kernels/fma_tile.cuh).
#pragma once

#include <cstdint>

#include "kernels/fma_tile.cuh"

namespace qlora::cuda {

template <class T>
RowsOperand<T> rows_operand(const void* data, std::int64_t columns, std::int64_t depth) {
  RowsOperand<T> operand{.data = {static_cast<const T*>(data), columns * depth},
                         .columns = columns,
                         .depth = depth,
                         .aligned = false};
  operand.aligned = depth % kQuad == 0 && operand.data.aligned(kQuad * sizeof(T));
  return operand;
}

template <class T>
ColumnsOperand<T> columns_operand(const void* data, std::int64_t depth, std::int64_t columns) {
  ColumnsOperand<T> operand{
      .data = {static_cast<const T*>(data), columns * depth}, .columns = columns, .aligned = false};
  operand.aligned = columns % kQuad == 0 && operand.data.aligned(kQuad * sizeof(T));
  return operand;
}

}  // namespace qlora::cuda
