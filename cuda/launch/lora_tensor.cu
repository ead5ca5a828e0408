// Which activations the tensor cores' kernel of the skinny products takes, and its launches.
#include "device/launch.cuh"
#include "kernels/lora_tensor.cuh"
#include "launch/lora_operands.h"
#include "launch/lora_tensor.h"
#include "launch/tiles.h"

namespace qlora::cuda {
namespace {

// Before it kernels are empty (kHasTensorCores16).
constexpr int kFromArchitecture = 80;

template <class T, class Right>
using Job = LoraTensorJob<T, Right>;

template <class T, class Right>
Job<T, Right> job_of(const LoraRuns& runs, RowMajor<T> left, const Right& right, float* sums) {
  return {.rows = runs.rows,
          .cols = runs.cols,
          .depth = runs.depth,
          .runs = runs.runs,
          .run_depth = runs.run_depth,
          .left = left,
          .right = right,
          .dropout = {},
          .adds_left = runs.beside,
          .sums = lora_sums(runs, sums)};
}

template <class T>
RowMajor<T> activations(const void* data, std::int64_t rows, std::int64_t columns) {
  return {{static_cast<const T*>(data), rows * columns}, rows, columns};
}

template <DepthOfLeft kDepth, int kColumns, class T, class Right>
Status multiply(LoraTensorArguments<T, Right> a, const Context& context) {
  const auto blocks = [](const Job<T, Right>& job) {
    const std::int64_t across = job.cols > 0 ? ceil_div(job.cols, kColumns) : 1;
    return across * ceil_div(job.rows, kLoraTileRows) * job.runs;
  };
  a.first_blocks = blocks(a.first);
  return launch(lora_tensor_kernel<T, Right, kDepth, kColumns>,
                {.grid = a.first_blocks + blocks(a.second),
                 .block = kLoraTensorThreads,
                 .dynamic_shared = lora_shared_bytes(kColumns),
                 .stream = context.stream},
                a);
}

// By the rank, which both jobs share.
template <DepthOfLeft kDepth, class T, class Right>
Status multiply(std::int64_t rank, const LoraTensorArguments<T, Right>& a, const Context& context) {
  return rank <= 16 ? multiply<kDepth, 16>(a, context) : multiply<kDepth, 32>(a, context);
}

template <class Fn>
Status with_16_bits(DType dtype, Fn&& fn) {
  return dtype == DType::float16 ? fn.template operator()<Float16>()
                                 : fn.template operator()<BFloat16>();
}

}  // namespace

bool lora_on_tensor_cores(DType dtype, const void* activations, std::int64_t columns) {
  int number = 0;
  return dtype != DType::float32 && columns % kPiece == 0 && aligned_to(activations, 16) &&
         architecture(&number).ok() && number >= kFromArchitecture;
}

Status lora_u_tensor(const LoraRuns& runs, const QloraLinearParams& p, float* sums,
                     const Context& context) {
  const Lora& lora = p.lora;
  const std::int64_t k = p.base.weight.cols;
  return with_16_bits(p.base.dtype, [&]<class T>() {
    LoraTensorArguments<T, AnyOperand<RowsOperand>> a{};
    a.first = job_of(runs, activations<T>(p.base.x, p.base.m, k),
                     any_rows(lora.dtype, lora.a, lora.r, k), sums);
    a.first.dropout = device_dropout(lora.dropout_p, lora.dropout_seed);
    return multiply<DepthOfLeft::along_rows>(lora.r, a, context);
  });
}

Status lora_g_tensor(const LoraRuns& runs, const QloraLinearBackwardParams& p, float* sums,
                     const Context& context) {
  const Lora& lora = p.lora;
  const std::int64_t n = p.weight.rows;
  return with_16_bits(p.dtype, [&]<class T>() {
    LoraTensorArguments<T, AnyOperand<ColumnsOperand>> a{};
    a.first = job_of(runs, activations<T>(p.grad_out, p.m, n),
                     any_columns(lora.dtype, lora.b, n, lora.r), sums);
    return multiply<DepthOfLeft::along_rows>(lora.r, a, context);
  });
}

Status lora_gradients_tensor(const LoraGradientSums& sums, const QloraLinearBackwardParams& p,
                             const float* g, const Context& context) {
  const std::int64_t n = p.weight.rows, k = p.weight.cols;
  return with_16_bits(p.dtype, [&]<class T>() {
    LoraTensorArguments<T, ColumnsOperand<float>> a{};
    if (sums.a != nullptr) {
      a.first = job_of(sums.of_a, activations<T>(p.x, p.m, k),
                       columns_operand<float>(g, p.m, p.lora.r), sums.a);
      a.first.dropout = device_dropout(p.lora.dropout_p, p.lora.dropout_seed);
    }
    if (sums.b != nullptr) {
      a.second = job_of(sums.of_b, activations<T>(p.grad_out, p.m, n),
                        columns_operand<float>(p.u, p.m, sums.of_b.cols), sums.b);
    }
    return multiply<DepthOfLeft::across_rows>(p.lora.r, a, context);
  });
}

}  // namespace qlora::cuda
