// qlora_linear and its gradients: the LoRA branch's skinny products, exact as fp32, and the base
// product with LoRA's second product on the same accumulators, by whichever way (linear_paths.h).
//
//   forward    u = drop(x) A^T          -> u, and scale * u as an operand
//              y = x W^T + bias + (scale u) B^T
//   backward   g = scale * dy B         -> g, and as an operand
//              dx = dy W + mask * gain * g A       dA = g^T drop(x)      dB, dbias from dy, once
//
// Scratch memory is some R values for each row of x, dy, A and B. All of it is asked for before
// anything is launched. Nothing dequantized outlives the call.
#include <utility>

#include "launch/launchers.h"
#include "launch/linear_paths.h"
#include "launch/lora.h"
#include "qlora_native/dropout.h"

namespace qlora::cuda {
namespace {

constexpr Status kNoMemory = {StatusCode::out_of_memory,
                              "no memory for the scratch space of the LoRA branch"};

// How the operands of LoRA's second product are written in the activations' type, so that the
// branch keeps fp32's exactness on tensor cores (kernels/lora_sums.cuh).
struct Operands {
  int parts;
  int left_low = -1, right_low = -1;  // which part has the low half
  std::int64_t padded;                // columns

  Operands(DType activations, const Lora& lora) {
    if (activations == DType::float32) {
      parts = 1;
    } else {
      parts = lora.dtype == activations ? 2 : 3;  // 2: A and B are what they are
      left_low = 1;
      if (parts == 3) right_low = 2;
    }
    padded = ceil_div(parts * lora.r, kRankStep) * kRankStep;
  }

 private:
  static constexpr std::int64_t kRankStep = 16;  // LoraTerm::r counts in these
};

// Scratch memory of one call.
class Workspace {
 public:
  explicit Workspace(const Context& context) : context_(context) {}

  // `n` elements, or null where there are none to take.
  void* take(std::int64_t n, DType dtype) {
    if (n == 0) return nullptr;
    void* memory = context_.allocate(context_.lender, n * size_of(dtype));
    failed_ |= memory == nullptr;
    return memory;
  }
  float* take_fp32(std::int64_t n) { return static_cast<float*>(take(n, DType::float32)); }
  [[nodiscard]] bool failed() const { return failed_; }

 private:
  const Context& context_;
  bool failed_ = false;
};

float gain_of(const Lora& lora) {
  return lora.dropout_p > 0.0f ? dropout_gain(lora.dropout_p) : 1.0f;
}

// As they lie: rows and columns changed about where they are transposed.
LoraSource sums_of(const LoraRuns& runs, const float* sums) {
  return {.dtype = DType::float32,
          .data = sums,
          .size = runs.sums(),
          .row_stride = runs.transposed ? runs.rows : runs.cols,
          .col_stride = 1,
          .runs = runs.runs,
          .run_stride = runs.rows * runs.cols};
}

// Of the column beside the product's (LoraSums).
LoraSource sums_beside(const LoraRuns& runs, const float* sums) {
  return {.dtype = DType::float32,
          .data = sums + runs.runs * runs.rows * runs.cols,
          .size = runs.runs * runs.rows,
          .row_stride = 1,
          .col_stride = 1,
          .runs = runs.runs,
          .run_stride = runs.rows};
}

LoraSource transposed(LoraSource source) {
  std::swap(source.row_stride, source.col_stride);
  return source;
}

LoraSource matrix(DType dtype, const void* data, std::int64_t rows, std::int64_t cols) {
  return {.dtype = dtype, .data = data, .size = rows * cols, .row_stride = cols, .col_stride = 1};
}

// dB [N, R] and dbias [N] of their sums.
Status grad_b_and_bias(const QloraLinearBackwardParams& p, const LoraRuns& runs, const float* sums,
                       const Context& context) {
  if (runs.cols > 0) {
    const LoraTarget grad_b{.rows = runs.rows,
                            .cols = runs.cols,
                            .factor = p.lora.scale,
                            .out_dtype = p.lora.dtype,
                            .out = p.grad_b};
    const Status status = lora_finish(sums_of(runs, sums), grad_b, context);
    if (!status.ok()) return status;
  }
  if (!runs.beside) return {};
  const LoraTarget grad_bias{
      .rows = runs.rows, .cols = 1, .out_dtype = p.dtype, .out = p.grad_bias};
  return lora_finish(sums_beside(runs, sums), grad_bias, context);
}

}  // namespace

Status qlora_linear(const QloraLinearParams& p, const Context& context) {
  const LinearParams& base = p.base;
  const Lora& lora = p.lora;
  const std::int64_t m = base.m, n = base.weight.rows, k = base.weight.cols, r = lora.r;
  if (r == 0 || m == 0) return linear_by_any_way(base, nullptr, context);

  const Operands operands(base.dtype, lora);
  const LoraRuns runs(m, r, k, lora_on_tensor_cores(base.dtype, base.x, k));
  Workspace workspace(context);
  float* sums = workspace.take_fp32(runs.sums());
  void* left = workspace.take(m * operands.padded, base.dtype);
  void* right = workspace.take(n * operands.padded, base.dtype);
  if (workspace.failed()) return kNoMemory;

  Status status = lora_u_sums(runs, p, sums, context);
  if (status.ok()) {
    status = lora_finish(sums_of(runs, sums),
                         {.rows = m,
                          .cols = r,
                          .factor = gain_of(lora),
                          .out = p.u,
                          .operand_factor = lora.scale,
                          .operand_dtype = base.dtype,
                          .operand = left,
                          .padded = operands.padded,
                          .parts = operands.parts,
                          .low_part = operands.left_low},
                         context);
  }
  if (status.ok()) {
    status = lora_finish(matrix(lora.dtype, lora.b, n, r),
                         {.rows = n,
                          .cols = r,
                          .operand_dtype = base.dtype,
                          .operand = right,
                          .padded = operands.padded,
                          .parts = operands.parts,
                          .low_part = operands.right_low},
                         context);
  }
  if (!status.ok()) return status;
  const LoraTerm term{.r = operands.padded, .left = left, .right = right};
  return linear_by_any_way(base, &term, context);
}

Status qlora_linear_backward(const QloraLinearBackwardParams& p, const Context& context) {
  const Lora& lora = p.lora;
  const std::int64_t m = p.m, n = p.weight.rows, k = p.weight.cols, r = lora.r;
  const Operands operands(p.dtype, lora);
  const bool wants_x = p.grad_x != nullptr, wants_a = p.grad_a != nullptr && r > 0;
  const bool wants_g = (wants_x || wants_a) && r > 0;
  const bool wants_b = p.grad_b != nullptr && r > 0, wants_bias = p.grad_bias != nullptr;
  const bool branch_in_x = wants_x && r > 0 && m > 0;

  const bool tensor_x = lora_on_tensor_cores(p.dtype, p.x, k);
  const bool tensor_dy = lora_on_tensor_cores(p.dtype, p.grad_out, n);
  const LoraRuns g_runs(m, r, n, tensor_dy);
  LoraGradientSums gradients{.of_a = LoraRuns(k, r, m, tensor_x, false, /*transposed=*/true),
                             .a = nullptr,
                             .of_b = LoraRuns(n, wants_b ? r : 0, m, tensor_dy, wants_bias),
                             .b = nullptr};
  Workspace workspace(context);
  float* g_sums = workspace.take_fp32(wants_g ? g_runs.sums() : 0);
  gradients.a = workspace.take_fp32(wants_a ? gradients.of_a.sums() : 0);
  gradients.b = workspace.take_fp32(gradients.of_b.sums());
  float* g = workspace.take_fp32(wants_g ? m * r : 0);
  void* left = workspace.take(branch_in_x ? m * operands.padded : 0, p.dtype);
  void* right = workspace.take(branch_in_x ? k * operands.padded : 0, p.dtype);
  if (workspace.failed()) return kNoMemory;

  Status status;
  if (wants_g) {
    status = lora_g_sums(g_runs, p, g_sums, context);
    if (status.ok()) {
      status = lora_finish(sums_of(g_runs, g_sums),
                           {.rows = m,
                            .cols = r,
                            .factor = lora.scale,
                            .out = g,
                            .operand_dtype = p.dtype,
                            .operand = left,
                            .padded = operands.padded,
                            .parts = operands.parts,
                            .low_part = operands.left_low},
                           context);
    }
  }
  if (status.ok() && branch_in_x) {
    status = lora_finish(transposed(matrix(lora.dtype, lora.a, r, k)),
                         {.rows = k,
                          .cols = r,
                          .operand_dtype = p.dtype,
                          .operand = right,
                          .padded = operands.padded,
                          .parts = operands.parts,
                          .low_part = operands.right_low},
                         context);
  }
  if (status.ok() && wants_x) {
    const LoraTerm term{.r = operands.padded,
                        .left = left,
                        .right = right,
                        .dropout_p = lora.dropout_p,
                        .dropout_seed = lora.dropout_seed};
    status = backward_input_by_any_way(
        {.m = m, .weight = p.weight, .dtype = p.dtype, .grad_out = p.grad_out, .grad_x = p.grad_x},
        branch_in_x ? &term : nullptr, context);
  }
  if (status.ok()) status = lora_gradient_sums(gradients, p, g, context);
  if (status.ok() && wants_a) {
    status = lora_finish(
        sums_of(gradients.of_a, gradients.a),
        {.rows = r, .cols = k, .factor = gain_of(lora), .out_dtype = lora.dtype, .out = p.grad_a},
        context);
  }
  if (status.ok() && (wants_b || wants_bias)) {
    status = grad_b_and_bias(p, gradients.of_b, gradients.b, context);
  }
  return status;
}

}  // namespace qlora::cuda
