#include "matmul.h"

#include <array>

#include "checks.h"

namespace qlora::torch_ops {
namespace {

using ::torch::stable::detail::from;
using ::torch::stable::detail::to;

template <std::size_t kArguments>
void call(const char* op, const char* overload, std::array<StableIValue, kArguments> stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  static_cast<void>(to<Tensor>(stack[0]));  // out once more, to be let go
}

}  // namespace

void torch_matmul(const Tensor& on, const MatmulParams& p) {
  std::int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(on.get(), &device_type));
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
  if (p.addend == MatmulParams::Addend::none) {
    call("aten::mm", "out", std::array{from(a), from(b), from(out)});
    return;
  }
  const Tensor addend = p.addend == MatmulParams::Addend::out
                            ? out
                            : view(p.bias, std::array{p.n}, std::array<std::int64_t, 1>{1});
  call("aten::addmm", "out",
       std::array{from(addend), from(a), from(b), from(1.0), from(1.0), from(out)});
}

}  // namespace qlora::torch_ops
