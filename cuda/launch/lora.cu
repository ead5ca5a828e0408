// The skinny products of the LoRA branch, and what is made of their sums.
#include <algorithm>

#include "device/launch.cuh"
#include "kernels/lora_product.cuh"
#include "kernels/lora_sums.cuh"
#include "launch/lora.h"
#include "launch/operands.h"
#include "qlora_native/dispatch.h"

namespace qlora::cuda {
namespace {

// Two for each multiprocessor of a large card, whichever card it is.
constexpr std::int64_t kWantedBlocks = 256;
constexpr std::int64_t kLeastRunDepth = 128;

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
                                            .cols = runs.cols,
                                            .depth = runs.depth,
                                            .runs = runs.runs,
                                            .run_depth = runs.run_depth,
                                            .left = left,
                                            .right = right,
                                            .sums = {sums, runs.sums()}};
  return runs.cols <= 16 ? multiply<16>(a, context) : multiply<32>(a, context);
}

AnyOperand<RowsOperand> any_rows(DType dtype, const void* data, std::int64_t columns,
                                 std::int64_t depth) {
  AnyOperand<RowsOperand> operand{.dtype = dtype, .fp32 = {}, .fp16 = {}, .bf16 = {}};
  if (dtype == DType::float32) operand.fp32 = rows_operand<float>(data, columns, depth);
  if (dtype == DType::float16) operand.fp16 = rows_operand<Float16>(data, columns, depth);
  if (dtype == DType::bfloat16) operand.bf16 = rows_operand<BFloat16>(data, columns, depth);
  return operand;
}

AnyOperand<ColumnsOperand> any_columns(DType dtype, const void* data, std::int64_t depth,
                                       std::int64_t columns) {
  AnyOperand<ColumnsOperand> operand{.dtype = dtype, .fp32 = {}, .fp16 = {}, .bf16 = {}};
  if (dtype == DType::float32) operand.fp32 = columns_operand<float>(data, depth, columns);
  if (dtype == DType::float16) operand.fp16 = columns_operand<Float16>(data, depth, columns);
  if (dtype == DType::bfloat16) operand.bf16 = columns_operand<BFloat16>(data, depth, columns);
  return operand;
}

}  // namespace

LoraRuns::LoraRuns(std::int64_t rows, std::int64_t cols, std::int64_t depth)
    : rows(rows), cols(cols), depth(depth), runs(1), run_depth(depth) {
  if (rows == 0 || depth == 0) return;
  const std::int64_t wanted = ceil_div(kWantedBlocks, ceil_div(rows, kLoraTileRows));
  const std::int64_t most = ceil_div(depth, kLeastRunDepth);
  const std::int64_t shortest = ceil_div(depth, std::min(wanted, most));
  run_depth = ceil_div(shortest, kStepDepth) * kStepDepth;
  runs = ceil_div(depth, run_depth);
}

Status lora_u_sums(const LoraRuns& runs, const QloraLinearParams& p, float* sums,
                   const Context& context) {
  const std::int64_t m = p.base.m, k = p.base.weight.cols;
  return with_type(p.base.dtype, [&]<class T>() {
    return multiply(runs,
                    DroppedOperand<RowsOperand<T>>{
                        .x = rows_operand<T>(p.base.x, m, k),
                        .dropout = device_dropout(p.lora.dropout_p, p.lora.dropout_seed)},
                    any_rows(p.lora.dtype, p.lora.a, p.lora.r, k), sums, context);
  });
}

Status lora_g_sums(const LoraRuns& runs, const QloraLinearBackwardParams& p, float* sums,
                   const Context& context) {
  const std::int64_t n = p.weight.rows;
  return with_type(p.dtype, [&]<class T>() {
    return multiply(runs, rows_operand<T>(p.grad_out, p.m, n),
                    any_columns(p.lora.dtype, p.lora.b, n, p.lora.r), sums, context);
  });
}

Status lora_grad_a_sums(const LoraRuns& runs, const QloraLinearBackwardParams& p, const float* g,
                        float* sums, const Context& context) {
  return with_type(p.dtype, [&]<class T>() {
    return multiply(runs,
                    DroppedOperand<ColumnsOperand<T>>{
                        .x = columns_operand<T>(p.x, p.m, p.weight.cols),
                        .dropout = device_dropout(p.lora.dropout_p, p.lora.dropout_seed)},
                    columns_operand<float>(g, p.m, p.lora.r), sums, context);
  });
}

Status lora_grad_b_sums(const LoraRuns& runs, const QloraLinearBackwardParams& p, std::int64_t r,
                        float* sums, const Context& context) {
  return with_type(p.dtype, [&]<class T>() {
    return multiply(runs, columns_operand<T>(p.grad_out, p.m, p.weight.rows),
                    OnesBeside{.u = columns_operand<float>(p.u, p.m, r), .ones = runs.cols > r},
                    sums, context);
  });
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
