#include "matmul.h"

#include <array>
#include <stdexcept>

#include "checks.h"
#include "torch_symbol.h"

namespace qlora::torch_ops {
namespace {

// aten::addmm.out has numbers among its arguments, which the stable dispatcher call does not take;
// these shims of torch do, and there is one for each device.
using AddmmOut = AOTITorchError (*)(AtenTensorHandle out, AtenTensorHandle addend,
                                    AtenTensorHandle a, AtenTensorHandle b, double beta,
                                    double alpha);

AddmmOut addmm_out(bool on_cpu) {
  static AddmmOut for_cpu = nullptr, for_cuda = nullptr;
  return on_cpu ? torch_function(for_cpu, "libtorch_cpu.so", "aoti_torch_cpu_addmm_out")
                : torch_function(for_cuda, "libtorch_cuda.so", "aoti_torch_cuda_addmm_out");
}

}  // namespace

void torch_matmul(const Tensor& on, const MatmulParams& p) {
  std::int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(on.get(), &device_type));
  using ::torch::stable::detail::from;
  using ::torch::stable::detail::to;
  const auto dtype = to<std::int32_t>(from(scalar_type(p.dtype)));
  // A tensor that looks at memory of somebody else.
  const auto view = [&]<std::size_t kDims>(const void* data,
                                           const std::array<std::int64_t, kDims>& sizes,
                                           const std::array<std::int64_t, kDims>& strides) {
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
        const_cast<void*>(data), kDims, sizes.data(), strides.data(), 0, dtype, device_type,
        on.get_device_index(), &handle));
    return Tensor(handle);
  };
  const auto matrix = [&](const MatrixIn& in, std::int64_t rows, std::int64_t cols) {
    using Pair = std::array<std::int64_t, 2>;
    return view(in.data, Pair{rows, cols},
                in.transposed ? Pair{1, in.row_stride} : Pair{in.row_stride, 1});
  };
  const Tensor a = matrix(p.a, p.m, p.k);
  const Tensor b = matrix(p.b, p.k, p.n);
  const Tensor out = matrix({.data = p.out, .row_stride = p.out_row_stride}, p.m, p.n);
  // Without a bias beta is 0, and what out holds is not read.
  const bool biased = p.bias != nullptr;
  const Tensor addend =
      biased ? view(p.bias, std::array{p.n}, std::array<std::int64_t, 1>{1}) : out;
  const AddmmOut addmm = addmm_out(on.is_cpu());
  if (addmm == nullptr) {
    throw std::runtime_error("this torch does not have aoti_torch_*_addmm_out");
  }
  STABLE_TORCH_ERROR_CODE_CHECK(
      addmm(out.get(), addend.get(), a.get(), b.get(), biased ? 1.0 : 0.0, 1.0));
}

}  // namespace qlora::torch_ops
