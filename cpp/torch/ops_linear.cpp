// The linear layer over a 4-bit weight [N, K], without and with its LoRA branch, and their
// gradients.
#include "checks.h"
#include "device.h"
#include "ops.h"
#include "weight.h"

namespace qlora::torch_ops {
namespace {

// x [..., last]: the number of its rows, with every leading dimension folded into M.
std::int64_t count_rows(const Checks& checks, const Tensor& x, const char* name) {
  checks.at_least_1d(x, name);
  const auto sizes = sizes_of(x);
  return checks.product(sizes.first(sizes.size() - 1), name);
}

std::int64_t last_size(const Tensor& x) { return sizes_of(x).back(); }

// x's shape with another last dimension.
Shape with_last(const Tensor& x, std::int64_t last) {
  const auto sizes = sizes_of(x);
  Shape shape(sizes.begin(), sizes.end());
  shape.back() = last;
  return shape;
}

void check_bias(const Checks& checks, const OptionalTensor& bias, const Tensor& x,
                std::int64_t out_features) {
  if (!bias.has_value()) return;
  checks.same_device(*bias, "bias", x, "x");
  checks.dtype(*bias, "bias (as x has it)", x.scalar_type());
  checks.shape(*bias, "bias", {{"out_features", out_features}});
}

const void* data_or_null(const OptionalTensor& t) {
  return t.has_value() ? t->const_data_ptr() : nullptr;
}

void run_linear_4bit(const Checks& checks, const Tensor& x, const WeightArguments& weight,
                     std::int64_t m, std::int64_t out_features, std::int64_t blocksize,
                     const std::string& format, const OptionalTensor& bias, DType dtype,
                     const Tensor& out) {
  const WeightTensors tensors(checks, weight, x, "x", out_features, last_size(x), blocksize,
                              format);
  const Device device = device_of(x);
  const LinearParams params{.m = m,
                            .weight = tensors.params(),
                            .dtype = dtype,
                            .x = x.const_data_ptr(),
                            .bias = data_or_null(bias),
                            .out = out.mutable_data_ptr()};
  checks.status(device.backend.linear_4bit(params, device.context));
}

// The LoRA branch as the ops receive it, checked, and held while a backend reads it.
class LoraTensors {
 public:
  LoraTensors(const Checks& checks, const Tensor& lora_a, const Tensor& lora_b, double lora_scale,
              double dropout_p, const OptionalTensor& dropout_seed, const Tensor& x)
      : a_(make_contiguous(lora_a)), b_(make_contiguous(lora_b)) {
    checks.same_device(a_, "lora_a", x, "x");
    checks.same_device(b_, "lora_b", x, "x");
    if (a_.dim() != 2)
      checks.fail("lora_a", "have shape [r, in_features]", to_string(sizes_of(a_)));
    if (b_.dim() != 2)
      checks.fail("lora_b", "have shape [out_features, r]", to_string(sizes_of(b_)));
    const std::int64_t r = a_.size(0);
    params_ = {.r = r,
               .dtype = checks.float_dtype(a_, "lora_a"),
               .a = a_.const_data_ptr(),
               .b = b_.const_data_ptr(),
               .scale = static_cast<float>(lora_scale),
               .dropout_p = static_cast<float>(dropout_p),
               .dropout_seed = nullptr};
    checks.dtype(b_, "lora_b (as lora_a has it)", a_.scalar_type());
    checks.shape(a_, "lora_a", {{"r", r}, {"in_features", last_size(x)}});
    checks.shape(b_, "lora_b", {{"out_features", out_features()}, {"r", r}});
    checks.in_range(dropout_p, "dropout_p", 0.0, 1.0);
    if (dropout_p == 0.0) return;
    if (!dropout_seed.has_value()) {
      checks.fail("dropout_seed", "be given where dropout_p is not 0", "None");
    }
    checks.same_device(*dropout_seed, "dropout_seed", x, "x");
    checks.dtype(*dropout_seed, "dropout_seed", ScalarType::Long);
    checks.numel(*dropout_seed, "dropout_seed", {"n_seeds", 1});
    seed_ = dropout_seed;
    params_.dropout_seed = static_cast<const std::int64_t*>(seed_->const_data_ptr());
  }

  [[nodiscard]] std::int64_t r() const { return params_.r; }
  [[nodiscard]] std::int64_t out_features() const { return b_.size(0); }
  [[nodiscard]] ScalarType dtype() const { return a_.scalar_type(); }
  [[nodiscard]] const Lora& params() const { return params_; }

 private:
  Tensor a_;
  Tensor b_;
  OptionalTensor seed_;
  Lora params_;
};

}  // namespace

Tensor linear_4bit(Tensor x, Tensor packed, Tensor absmax, OptionalTensor nested_absmax,
                   OptionalTensor nested_offset, std::int64_t out_features, std::int64_t blocksize,
                   std::string format, OptionalTensor bias) {
  const Checks checks("linear_4bit");
  const std::int64_t m = count_rows(checks, x, "x");
  const DType dtype = checks.float_dtype(x, "x");
  checks.size(out_features, "out_features");
  check_bias(checks, bias, x, out_features);
  checks.product(m, out_features, "the output");
  x = make_contiguous(x);
  const Tensor out = empty_on(x, with_last(x, out_features), x.scalar_type());
  run_linear_4bit(checks, x, {packed, absmax, nested_absmax, nested_offset}, m, out_features,
                  blocksize, format, make_contiguous(bias), dtype, out);
  return out;
}

void linear_4bit_out(Tensor x, Tensor packed, Tensor absmax, OptionalTensor nested_absmax,
                     OptionalTensor nested_offset, std::int64_t blocksize, std::string format,
                     OptionalTensor bias, Tensor out) {
  const Checks checks("linear_4bit.out");
  checks.same_device(out, "out", x, "x");
  const std::int64_t m = count_rows(checks, x, "x");
  checks.at_least_1d(out, "out");
  const std::int64_t out_features = last_size(out);
  const DType dtype = checks.float_dtype(x, "x");
  checks.dtype(out, "out (as x has it)", x.scalar_type());
  checks.shape(out, "out", with_last(x, out_features));
  check_bias(checks, bias, x, out_features);
  checks.output(out, "out");
  x = make_contiguous(x);
  checks.no_overlap(out, "out", x, "x");
  checks.no_overlap(out, "out", packed, "packed");
  checks.no_overlap(out, "out", absmax, "absmax");
  if (bias.has_value()) checks.no_overlap(out, "out", *bias, "bias");
  run_linear_4bit(checks, x, {packed, absmax, nested_absmax, nested_offset}, m, out_features,
                  blocksize, format, make_contiguous(bias), dtype, out);
}

Tensor linear_4bit_backward_input(Tensor grad_out, Tensor packed, Tensor absmax,
                                  OptionalTensor nested_absmax, OptionalTensor nested_offset,
                                  std::int64_t in_features, std::int64_t blocksize,
                                  std::string format) {
  const Checks checks("linear_4bit_backward_input");
  const std::int64_t m = count_rows(checks, grad_out, "grad_out");
  const DType dtype = checks.float_dtype(grad_out, "grad_out");
  checks.size(in_features, "in_features");
  checks.product(m, in_features, "the output");
  grad_out = make_contiguous(grad_out);
  const WeightTensors weight(checks, {packed, absmax, nested_absmax, nested_offset}, grad_out,
                             "grad_out", last_size(grad_out), in_features, blocksize, format);
  const Tensor grad_x =
      empty_on(grad_out, with_last(grad_out, in_features), grad_out.scalar_type());
  const Device device = device_of(grad_out);
  const LinearBackwardInputParams params{.m = m,
                                         .weight = weight.params(),
                                         .dtype = dtype,
                                         .grad_out = grad_out.const_data_ptr(),
                                         .grad_x = grad_x.mutable_data_ptr()};
  checks.status(device.backend.linear_4bit_backward_input(params, device.context));
  return grad_x;
}

std::tuple<Tensor, Tensor> qlora_linear(Tensor x, Tensor packed, Tensor absmax,
                                        OptionalTensor nested_absmax, OptionalTensor nested_offset,
                                        std::int64_t blocksize, std::string format,
                                        OptionalTensor bias, Tensor lora_a, Tensor lora_b,
                                        double lora_scale, double dropout_p,
                                        OptionalTensor dropout_seed) {
  const Checks checks("qlora_linear");
  const std::int64_t m = count_rows(checks, x, "x");
  const DType dtype = checks.float_dtype(x, "x");
  const LoraTensors lora(checks, lora_a, lora_b, lora_scale, dropout_p, dropout_seed, x);
  const std::int64_t out_features = lora.out_features();
  check_bias(checks, bias, x, out_features);
  checks.product(m, out_features, "the output");
  x = make_contiguous(x);
  bias = make_contiguous(bias);
  const WeightTensors weight(checks, {packed, absmax, nested_absmax, nested_offset}, x, "x",
                             out_features, last_size(x), blocksize, format);
  Tensor out = empty_on(x, with_last(x, out_features), x.scalar_type());
  Tensor u = empty_on(x, with_last(x, lora.r()), ScalarType::Float);
  const Device device = device_of(x);
  const QloraLinearParams params{.base = {.m = m,
                                          .weight = weight.params(),
                                          .dtype = dtype,
                                          .x = x.const_data_ptr(),
                                          .bias = data_or_null(bias),
                                          .out = out.mutable_data_ptr()},
                                 .lora = lora.params(),
                                 .u = static_cast<float*>(u.mutable_data_ptr())};
  checks.status(device.backend.qlora_linear(params, device.context));
  return {out, u};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qlora_linear_backward(
    Tensor grad_out, Tensor x, Tensor u, Tensor packed, Tensor absmax, OptionalTensor nested_absmax,
    OptionalTensor nested_offset, std::int64_t blocksize, std::string format, Tensor lora_a,
    Tensor lora_b, double lora_scale, double dropout_p, OptionalTensor dropout_seed,
    bool need_grad_x, bool need_grad_a, bool need_grad_b, bool need_grad_bias) {
  const Checks checks("qlora_linear_backward");
  checks.same_device(grad_out, "grad_out", x, "x");
  checks.same_device(u, "u", x, "x");
  const std::int64_t m = count_rows(checks, x, "x");
  const DType dtype = checks.float_dtype(x, "x");
  const LoraTensors lora(checks, lora_a, lora_b, lora_scale, dropout_p, dropout_seed, x);
  const std::int64_t out_features = lora.out_features();
  const std::int64_t in_features = last_size(x);
  checks.dtype(grad_out, "grad_out (as x has it)", x.scalar_type());
  checks.dtype(u, "u", ScalarType::Float);
  checks.shape(grad_out, "grad_out", with_last(x, out_features));
  checks.shape(u, "u", with_last(x, lora.r()));
  grad_out = make_contiguous(grad_out);
  x = make_contiguous(x);
  u = make_contiguous(u);
  const WeightTensors weight(checks, {packed, absmax, nested_absmax, nested_offset}, x, "x",
                             out_features, in_features, blocksize, format);

  // A gradient nobody asked for is an empty tensor.
  const auto gradient = [&](bool needed, Shape shape, ScalarType type) {
    return needed ? empty_on(x, shape, type) : empty_on(x, 0, type);
  };
  const auto pointer = [](bool needed, const Tensor& t) {
    return needed ? t.mutable_data_ptr() : nullptr;
  };
  Tensor grad_x = gradient(need_grad_x, with_last(x, in_features), x.scalar_type());
  Tensor grad_a = gradient(need_grad_a, {lora.r(), in_features}, lora.dtype());
  Tensor grad_b = gradient(need_grad_b, {out_features, lora.r()}, lora.dtype());
  Tensor grad_bias = gradient(need_grad_bias, {out_features}, x.scalar_type());
  const Device device = device_of(x);
  const QloraLinearBackwardParams params{.m = m,
                                         .weight = weight.params(),
                                         .lora = lora.params(),
                                         .dtype = dtype,
                                         .grad_out = grad_out.const_data_ptr(),
                                         .x = x.const_data_ptr(),
                                         .u = static_cast<const float*>(u.const_data_ptr()),
                                         .grad_x = pointer(need_grad_x, grad_x),
                                         .grad_a = pointer(need_grad_a, grad_a),
                                         .grad_b = pointer(need_grad_b, grad_b),
                                         .grad_bias = pointer(need_grad_bias, grad_bias)};
  checks.status(device.backend.qlora_linear_backward(params, device.context));
  return {grad_x, grad_a, grad_b, grad_bias};
}

}  // namespace qlora::torch_ops
