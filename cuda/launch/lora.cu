// The skinny products of the LoRA branch, and what is made of their sums.
#include <algorithm>

#include "device/launch.cuh"
#include "kernels/lora_product.cuh"
#include "kernels/lora_sums.cuh"
#include "kernels/lora_tensor.cuh"
#include "launch/lora.h"
#include "launch/lora_operands.h"
#include "launch/lora_tensor.h"
#include "qlora_native/dispatch.h"

namespace qlora::cuda {
namespace {

// How a product's depth is cut, whichever card it is. On the CUDA cores two blocks for each
// multiprocessor of a large card keep up with memory, on the tensor cores one, which is a stream of
// copies, and the other gradient's job beside it: fewer runs, whose sums go to memory and back.
struct Cut {
  std::int64_t wanted_blocks;
  std::int64_t least_depth;
  std::int64_t step;
};
constexpr Cut kOnCudaCores{.wanted_blocks = 256, .least_depth = 128, .step = kStepDepth};
constexpr Cut kOnTensorCores{.wanted_blocks = 128, .least_depth = 512, .step = kLoraTensorStep};

template <int kTileCols, class Left, class Right>
Status multiply(const LoraProductArguments<Left, Right>& a, const Context& context) {
  return launch(lora_product_kernel<kTileCols, Left, Right>,
                {.grid = ceil_div(a.cols, kTileCols) * ceil_div(a.rows, kLoraTileRows) * a.runs,
                 .block = FmaTile<kLoraTileRows, kTileCols>::kThreads,
                 .stream = context.stream},
                a);
}

template <class Left, class Right>
Status multiply(const LoraRuns& runs, const Left& left, const Right& right, float* sums,
                const Context& context) {
  const LoraProductArguments<Left, Right> a{.rows = runs.rows,
                                            .cols = runs.cols + (runs.beside ? 1 : 0),
                                            .depth = runs.depth,
                                            .runs = runs.runs,
                                            .run_depth = runs.run_depth,
                                            .left = left,
                                            .right = right,
                                            .sums = lora_sums(runs, sums)};
  return a.cols <= 16 ? multiply<16>(a, context) : multiply<32>(a, context);
}

Status grad_a_sums(const LoraGradientSums& sums, const QloraLinearBackwardParams& p, const float* g,
                   const Context& context) {
  return with_type(p.dtype, [&]<class T>() {
    return multiply(sums.of_a,
                    DroppedOperand<ColumnsOperand<T>>{
                        .x = columns_operand<T>(p.x, p.m, p.weight.cols),
                        .dropout = device_dropout(p.lora.dropout_p, p.lora.dropout_seed)},
                    columns_operand<float>(g, p.m, p.lora.r), sums.a, context);
  });
}

Status grad_b_sums(const LoraGradientSums& sums, const QloraLinearBackwardParams& p,
                   const Context& context) {
  const std::int64_t r = sums.of_b.cols;
  return with_type(p.dtype, [&]<class T>() {
    return multiply(sums.of_b, columns_operand<T>(p.grad_out, p.m, p.weight.rows),
                    OnesBeside{.u = columns_operand<float>(p.u, p.m, r), .ones = sums.of_b.beside},
                    sums.b, context);
  });
}

}  // namespace

LoraRuns::LoraRuns(std::int64_t rows, std::int64_t cols, std::int64_t depth, bool on_tensor_cores,
                   bool beside, bool transposed)
    : rows(rows),
      cols(cols),
      depth(depth),
      beside(beside),
      transposed(transposed),
      on_tensor_cores(on_tensor_cores),
      runs(1),
      run_depth(depth) {
  if (rows == 0 || depth == 0) return;
  const Cut cut = on_tensor_cores ? kOnTensorCores : kOnCudaCores;
  const std::int64_t wanted = ceil_div(cut.wanted_blocks, ceil_div(rows, kLoraTileRows));
  const std::int64_t most = ceil_div(depth, cut.least_depth);
  const std::int64_t shortest = ceil_div(depth, std::min(wanted, most));
  run_depth = ceil_div(shortest, cut.step) * cut.step;
  runs = ceil_div(depth, run_depth);
}

Status lora_u_sums(const LoraRuns& runs, const QloraLinearParams& p, float* sums,
                   const Context& context) {
  if (runs.on_tensor_cores) return lora_u_tensor(runs, p, sums, context);
  const std::int64_t k = p.base.weight.cols;
  return with_type(p.base.dtype, [&]<class T>() {
    return multiply(runs,
                    DroppedOperand<RowsOperand<T>>{
                        .x = rows_operand<T>(p.base.x, p.base.m, k),
                        .dropout = device_dropout(p.lora.dropout_p, p.lora.dropout_seed)},
                    any_rows(p.lora.dtype, p.lora.a, p.lora.r, k), sums, context);
  });
}

Status lora_g_sums(const LoraRuns& runs, const QloraLinearBackwardParams& p, float* sums,
                   const Context& context) {
  if (runs.on_tensor_cores) return lora_g_tensor(runs, p, sums, context);
  const std::int64_t n = p.weight.rows;
  return with_type(p.dtype, [&]<class T>() {
    return multiply(runs, rows_operand<T>(p.grad_out, p.m, n),
                    any_columns(p.lora.dtype, p.lora.b, n, p.lora.r), sums, context);
  });
}

Status lora_gradient_sums(const LoraGradientSums& sums, const QloraLinearBackwardParams& p,
                          const float* g, const Context& context) {
  LoraGradientSums tensor = sums, cuda_cores = sums;
  (sums.of_a.on_tensor_cores ? cuda_cores : tensor).a = nullptr;
  (sums.of_b.on_tensor_cores ? cuda_cores : tensor).b = nullptr;
  Status status;
  if (tensor.a != nullptr || tensor.b != nullptr) {
    status = lora_gradients_tensor(tensor, p, g, context);
  }
  if (status.ok() && cuda_cores.a != nullptr) status = grad_a_sums(sums, p, g, context);
  if (status.ok() && cuda_cores.b != nullptr) status = grad_b_sums(sums, p, context);
  return status;
}

Status lora_finish(const LoraSource& source, const LoraTarget& target, const Context& context) {
  int processors = 0;
  if (const Status status = multiprocessors(&processors); !status.ok()) return status;
  const std::int64_t resident = std::int64_t{processors} * (2048 / kLoraSumThreads);
  const std::int64_t blocks = ceil_div(target.rows * target.cols, kLoraSumThreads);
  return launch(
      lora_sums_kernel,
      {.grid = std::min(blocks, resident), .block = kLoraSumThreads, .stream = context.stream},
      LoraSumsArguments{.rows = target.rows,
                        .cols = target.cols,
                        .padded = target.operand != nullptr ? target.padded : 0,
                        .parts = target.parts,
                        .low_part = target.low_part,
                        .runs = source.runs,
                        .factor = target.factor,
                        .operand_factor = target.operand_factor,
                        .source = {source.data, source.dtype},
                        .source_size = source.size,
                        .run_stride = source.run_stride,
                        .row_stride = source.row_stride,
                        .col_stride = source.col_stride,
                        .has_out = target.out != nullptr,
                        .out = {target.out, target.out_dtype},
                        .operand = {target.operand, target.operand_dtype}});
}

}  // namespace qlora::cuda
