// The linear layer of a mixture of experts: a stack of G 4-bit matrices [N, K], each multiplied
// with its own group of x's rows. The stack is one weight [G*N, K] as quantize_4bit leaves it, and
// a matrix is a view of its rows, so the backends' linear_4bit serves it as it is.
#include "checks.h"
#include "device.h"
#include "ops.h"
#include "weight.h"

namespace qlora::torch_ops {
namespace {

// Where the groups end, on the host: from 0, never back, to m.
std::vector<std::int64_t> group_ends(const Checks& checks, const Tensor& offsets, std::int64_t m) {
  checks.dtype(offsets, "offsets", ScalarType::Int);
  if (offsets.dim() != 1) {
    checks.fail("offsets", "have shape [n_groups]", to_string(sizes_of(offsets)));
  }
  const Tensor host = on_host(offsets);
  const auto* ends = static_cast<const std::int32_t*>(host.const_data_ptr());
  std::vector<std::int64_t> result(ends, ends + host.numel());
  std::int64_t before = 0;
  for (const std::int64_t end : result) {
    if (end < before) checks.fail("offsets", "never decrease from 0", to_string(result));
    before = end;
  }
  if (before != m) {
    checks.fail("offsets", "end at the number of rows, " + std::to_string(m), to_string(result));
  }
  return result;
}

// The stack [G*N, K], checked, and held while a backend reads its matrices.
class StackTensors {
 public:
  StackTensors(const Checks& checks, const WeightArguments& weight, const Tensor& first,
               const char* first_name, std::int64_t n_groups, std::int64_t rows, std::int64_t cols,
               std::int64_t blocksize, const std::string& format, Device& device)
      : tensors_(checks, weight, first, first_name,
                 checks.product(n_groups, rows, "n_groups * out_features"), cols, blocksize,
                 format),
        stack_(tensors_.params()),
        rows_(rows) {
    if (n_groups <= 1 || begins_blocks(stack_, rows)) return;
    if (rows * cols % blocksize != 0) {
      checks.fail("blocksize",
                  "divide out_features * in_features, so that each matrix begins with a block",
                  std::to_string(blocksize));
    }
    // The scales of a matrix begin within a nested block: those of all are dequantized first.
    const std::int64_t n = n_blocks(stack_.rows * cols, blocksize);
    absmax_ = empty_on(first, n, ScalarType::Float);
    auto* absmax = static_cast<float*>(absmax_->mutable_data_ptr());
    checks.status(device.backend.dequantize_scales(
        {.n = n, .scales = stack_.scales, .absmax = absmax}, device.context));
    stack_.scales = {.absmax = absmax};
  }

  [[nodiscard]] Weight4bit matrix(std::size_t group) const {
    return rows_of(stack_, static_cast<std::int64_t>(group) * rows_, rows_);
  }

 private:
  WeightTensors tensors_;
  OptionalTensor absmax_;
  Weight4bit stack_;
  std::int64_t rows_;  // of a matrix
};

// Row `i` of a contiguous matrix.
const void* row(const Tensor& t, std::int64_t i) {
  return static_cast<const std::byte*>(t.const_data_ptr()) + i * t.size(1) * t.element_size();
}

void* mutable_row(const Tensor& t, std::int64_t i) {
  return static_cast<std::byte*>(t.mutable_data_ptr()) + i * t.size(1) * t.element_size();
}

// run(group, first row, number of rows) of every group that has rows.
template <class Run>
void for_each_group(std::span<const std::int64_t> ends, Run&& run) {
  std::int64_t begin = 0;
  for (std::size_t group = 0; group < ends.size(); begin = ends[group], ++group) {
    if (ends[group] > begin) run(group, begin, ends[group] - begin);
  }
}

std::int64_t rows_of_matrix(const Checks& checks, const Tensor& x, const char* name) {
  if (x.dim() != 2) checks.fail(name, "have two dimensions", to_string(sizes_of(x)));
  return x.size(0);
}

}  // namespace

Tensor grouped_linear_4bit(Tensor x, Tensor offsets, Tensor packed, Tensor absmax,
                           OptionalTensor nested_absmax, OptionalTensor nested_offset,
                           std::int64_t out_features, std::int64_t blocksize, std::string format) {
  const Checks checks("grouped_linear_4bit");
  checks.same_device(offsets, "offsets", x, "x");
  const std::int64_t m = rows_of_matrix(checks, x, "x");
  const DType dtype = checks.float_dtype(x, "x");
  checks.size(out_features, "out_features");
  checks.product(m, out_features, "the output");
  const std::vector<std::int64_t> ends = group_ends(checks, offsets, m);
  x = make_contiguous(x);
  Device device = device_of(x);
  const StackTensors stack(checks, {packed, absmax, nested_absmax, nested_offset}, x, "x",
                           static_cast<std::int64_t>(ends.size()), out_features, x.size(1),
                           blocksize, format, device);
  const Tensor out = empty_on(x, Shape{m, out_features}, x.scalar_type());
  for_each_group(ends, [&](std::size_t group, std::int64_t begin, std::int64_t rows) {
    const LinearParams params{.m = rows,
                              .weight = stack.matrix(group),
                              .dtype = dtype,
                              .x = row(x, begin),
                              .bias = nullptr,
                              .out = mutable_row(out, begin)};
    checks.status(device.backend.linear_4bit(params, device.context));
  });
  return out;
}

Tensor grouped_linear_4bit_backward_input(Tensor grad_out, Tensor offsets, Tensor packed,
                                          Tensor absmax, OptionalTensor nested_absmax,
                                          OptionalTensor nested_offset, std::int64_t in_features,
                                          std::int64_t blocksize, std::string format) {
  const Checks checks("grouped_linear_4bit_backward_input");
  checks.same_device(offsets, "offsets", grad_out, "grad_out");
  const std::int64_t m = rows_of_matrix(checks, grad_out, "grad_out");
  const DType dtype = checks.float_dtype(grad_out, "grad_out");
  checks.size(in_features, "in_features");
  checks.product(m, in_features, "the output");
  const std::vector<std::int64_t> ends = group_ends(checks, offsets, m);
  grad_out = make_contiguous(grad_out);
  Device device = device_of(grad_out);
  const StackTensors stack(checks, {packed, absmax, nested_absmax, nested_offset}, grad_out,
                           "grad_out", static_cast<std::int64_t>(ends.size()), grad_out.size(1),
                           in_features, blocksize, format, device);
  const Tensor grad_x = empty_on(grad_out, Shape{m, in_features}, grad_out.scalar_type());
  for_each_group(ends, [&](std::size_t group, std::int64_t begin, std::int64_t rows) {
    const LinearBackwardInputParams params{.m = rows,
                                           .weight = stack.matrix(group),
                                           .dtype = dtype,
                                           .grad_out = row(grad_out, begin),
                                           .grad_x = mutable_row(grad_x, begin)};
    checks.status(device.backend.linear_4bit_backward_input(params, device.context));
  });
  return grad_x;
}

}  // namespace qlora::torch_ops
