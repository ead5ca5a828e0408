// AdamW over many tensors in one call, with 32-bit state and with 8-bit blockwise state.
#include <limits>
#include <string>

#include "checks.h"
#include "device.h"
#include "ops.h"

namespace qlora::torch_ops {
namespace {

constexpr double kNoLimit = std::numeric_limits<double>::infinity();

const float* flag(const Checks& checks, const OptionalTensor& t, const char* name,
                  const Tensor& first) {
  if (!t.has_value()) return nullptr;
  checks.same_device(*t, name, first, "params[0]");
  checks.dtype(*t, name, ScalarType::Float);
  checks.numel(*t, name, {"n_flags", 1});
  return static_cast<const float*>(t->const_data_ptr());
}

void check_hyper(const Checks& checks, const AdamwHyper& hyper) {
  checks.in_range(hyper.lr, "lr", 0.0, kNoLimit);
  checks.in_range(hyper.beta1, "beta1", 0.0, 1.0);
  checks.in_range(hyper.beta2, "beta2", 0.0, 1.0);
  checks.in_range(hyper.eps, "eps", 0.0, kNoLimit);
  checks.in_range(hyper.weight_decay, "weight_decay", 0.0, kNoLimit);
  if (hyper.step < 1) checks.fail("step", "be 1 or more", std::to_string(hyper.step));
}

void check_length(const Checks& checks, const Tensors& list, const char* name,
                  const Tensors& params) {
  if (list.size() == params.size()) return;
  checks.fail(name, "have as many tensors as params, " + std::to_string(params.size()),
              std::to_string(list.size()));
}

// Parameter i and its gradient, the latter contiguous; messages name "grads[i]" when something is
// off.
class Indexed {
 public:
  Indexed(const Checks& checks, std::size_t i, const Tensor& first)
      : checks_(checks), index_(std::to_string(i)), first_(first) {}

  [[nodiscard]] std::string name(const char* list) const {
    return std::string(list).append("[").append(index_).append("]");
  }

  DType float_dtype(const Tensor& t, const char* list) const {
    checks_.same_device(t, name(list).c_str(), first_, "params[0]");
    return checks_.float_dtype(t, name(list).c_str());
  }

  void state(const Tensor& t, const char* list, ScalarType dtype,
             std::span<const std::int64_t> shape) const {
    const std::string full_name = name(list);
    checks_.same_device(t, full_name.c_str(), first_, "params[0]");
    checks_.dtype(t, full_name.c_str(), dtype);
    checks_.shape(t, full_name.c_str(), shape);
    checks_.output(t, full_name.c_str());
  }

  void apart(const Tensor& out, const char* out_list, const Tensor& other,
             const char* other_list) const {
    checks_.no_overlap(out, name(out_list).c_str(), other, name(other_list).c_str());
  }

 private:
  const Checks& checks_;
  std::string index_;
  const Tensor& first_;
};

}  // namespace

void adamw_step(Tensors params, Tensors grads, Tensors exp_avg, Tensors exp_avg_sq, double lr,
                double beta1, double beta2, double eps, double weight_decay, std::int64_t step,
                bool maximize, OptionalTensor grad_scale, OptionalTensor found_inf) {
  const Checks checks("adamw_step");
  check_length(checks, grads, "grads", params);
  check_length(checks, exp_avg, "exp_avg", params);
  check_length(checks, exp_avg_sq, "exp_avg_sq", params);
  if (params.empty()) return;
  const Tensor& first = params[0];
  const AdamwHyper hyper{.lr = lr,
                         .beta1 = beta1,
                         .beta2 = beta2,
                         .eps = eps,
                         .weight_decay = weight_decay,
                         .step = step,
                         .maximize = maximize,
                         .grad_scale = flag(checks, grad_scale, "grad_scale", first),
                         .found_inf = flag(checks, found_inf, "found_inf", first)};
  check_hyper(checks, hyper);
  std::vector<AdamwTensor> tensors(params.size());
  for (std::size_t i = 0; i < params.size(); ++i) {
    const Indexed at(checks, i, first);
    AdamwTensor& t = tensors[i];
    const auto shape = sizes_of(params[i]);
    t.n = params[i].numel();
    t.param_dtype = at.float_dtype(params[i], "params");
    t.grad_dtype = at.float_dtype(grads[i], "grads");
    checks.shape(grads[i], at.name("grads").c_str(), shape);
    checks.output(params[i], at.name("params").c_str());
    at.state(exp_avg[i], "exp_avg", ScalarType::Float, shape);
    at.state(exp_avg_sq[i], "exp_avg_sq", ScalarType::Float, shape);
    grads[i] = make_contiguous(grads[i]);
    at.apart(params[i], "params", grads[i], "grads");
    at.apart(exp_avg[i], "exp_avg", params[i], "params");
    at.apart(exp_avg[i], "exp_avg", grads[i], "grads");
    at.apart(exp_avg_sq[i], "exp_avg_sq", params[i], "params");
    at.apart(exp_avg_sq[i], "exp_avg_sq", grads[i], "grads");
    at.apart(exp_avg_sq[i], "exp_avg_sq", exp_avg[i], "exp_avg");
    t.param = params[i].mutable_data_ptr();
    t.grad = grads[i].const_data_ptr();
    t.exp_avg = static_cast<float*>(exp_avg[i].mutable_data_ptr());
    t.exp_avg_sq = static_cast<float*>(exp_avg_sq[i].mutable_data_ptr());
  }
  const Device device = device_of(first);
  const AdamwStepParams step_params{.hyper = hyper,
                                    .n_tensors = static_cast<std::int64_t>(tensors.size()),
                                    .tensors = tensors.data()};
  checks.status(device.backend.adamw_step(step_params, device.context));
}

void adamw_8bit_step(Tensors params, Tensors grads, Tensors exp_avg, Tensors exp_avg_sq,
                     Tensors exp_avg_absmax, Tensors exp_avg_sq_absmax, double lr, double beta1,
                     double beta2, double eps, double weight_decay, std::int64_t step,
                     bool maximize, OptionalTensor grad_scale, OptionalTensor found_inf) {
  const Checks checks("adamw_8bit_step");
  check_length(checks, grads, "grads", params);
  check_length(checks, exp_avg, "exp_avg", params);
  check_length(checks, exp_avg_sq, "exp_avg_sq", params);
  check_length(checks, exp_avg_absmax, "exp_avg_absmax", params);
  check_length(checks, exp_avg_sq_absmax, "exp_avg_sq_absmax", params);
  if (params.empty()) return;
  const Tensor& first = params[0];
  const AdamwHyper hyper{.lr = lr,
                         .beta1 = beta1,
                         .beta2 = beta2,
                         .eps = eps,
                         .weight_decay = weight_decay,
                         .step = step,
                         .maximize = maximize,
                         .grad_scale = flag(checks, grad_scale, "grad_scale", first),
                         .found_inf = flag(checks, found_inf, "found_inf", first)};
  check_hyper(checks, hyper);
  std::vector<Adamw8bitTensor> tensors(params.size());
  for (std::size_t i = 0; i < params.size(); ++i) {
    const Indexed at(checks, i, first);
    Adamw8bitTensor& t = tensors[i];
    const auto shape = sizes_of(params[i]);
    t.n = params[i].numel();
    const Shape blocks{n_blocks(t.n, kOptimizerBlocksize)};
    t.param_dtype = at.float_dtype(params[i], "params");
    t.grad_dtype = at.float_dtype(grads[i], "grads");
    checks.shape(grads[i], at.name("grads").c_str(), shape);
    checks.output(params[i], at.name("params").c_str());
    at.state(exp_avg[i], "exp_avg", ScalarType::Byte, shape);
    at.state(exp_avg_sq[i], "exp_avg_sq", ScalarType::Byte, shape);
    at.state(exp_avg_absmax[i], "exp_avg_absmax", ScalarType::Float, blocks);
    at.state(exp_avg_sq_absmax[i], "exp_avg_sq_absmax", ScalarType::Float, blocks);
    grads[i] = make_contiguous(grads[i]);
    at.apart(params[i], "params", grads[i], "grads");
    at.apart(exp_avg[i], "exp_avg", params[i], "params");
    at.apart(exp_avg_sq[i], "exp_avg_sq", params[i], "params");
    at.apart(exp_avg_sq[i], "exp_avg_sq", exp_avg[i], "exp_avg");
    at.apart(exp_avg_sq_absmax[i], "exp_avg_sq_absmax", exp_avg_absmax[i], "exp_avg_absmax");
    t.param = params[i].mutable_data_ptr();
    t.grad = grads[i].const_data_ptr();
    t.exp_avg = static_cast<std::uint8_t*>(exp_avg[i].mutable_data_ptr());
    t.exp_avg_sq = static_cast<std::uint8_t*>(exp_avg_sq[i].mutable_data_ptr());
    t.exp_avg_absmax = static_cast<float*>(exp_avg_absmax[i].mutable_data_ptr());
    t.exp_avg_sq_absmax = static_cast<float*>(exp_avg_sq_absmax[i].mutable_data_ptr());
  }
  const Device device = device_of(first);
  const Adamw8bitStepParams step_params{.hyper = hyper,
                                        .n_tensors = static_cast<std::int64_t>(tensors.size()),
                                        .tensors = tensors.data()};
  checks.status(device.backend.adamw_8bit_step(step_params, device.context));
}

}  // namespace qlora::torch_ops
