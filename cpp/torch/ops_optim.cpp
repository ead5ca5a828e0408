// The optimizers' steps over many tensors in one call, with 32-bit state and with 8-bit blockwise
// state.
#include <array>
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

// What every rule's hyperparameters have.
template <class Hyper>
Hyper with_gradient(const Checks& checks, Hyper hyper, bool maximize,
                    const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                    const Tensors& params) {
  hyper.maximize = maximize;
  if (params.empty()) return hyper;
  hyper.grad_scale = flag(checks, grad_scale, "grad_scale", params[0]);
  hyper.found_inf = flag(checks, found_inf, "found_inf", params[0]);
  return hyper;
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

// The state of a rule as an op receives it: a list for each moment and, in 8 bits, for its scales.
struct StateList {
  const char* name;
  const Tensors& tensors;
};
template <int kMoments>
using StateLists = std::array<StateList, kMoments>;

// Checks what all lists of a step share, then each state by `state`, and runs the op.
template <class StepParams, class FillState>
void run(const Checks& checks, const typename StepParams::Hyper& hyper, Tensors& params,
         Tensors& grads, Status (*Backend::*op)(const StepParams&, const Context&),
         const FillState& fill_state) {
  if (params.empty()) return;
  const Tensor& first = params[0];
  std::vector<typename StepParams::Tensor> tensors(params.size());
  for (std::size_t i = 0; i < params.size(); ++i) {
    const Indexed at(checks, i, first);
    auto& t = tensors[i];
    t.n = params[i].numel();
    t.param_dtype = at.float_dtype(params[i], "params");
    t.grad_dtype = at.float_dtype(grads[i], "grads");
    checks.shape(grads[i], at.name("grads").c_str(), sizes_of(params[i]));
    checks.output(params[i], at.name("params").c_str());
    grads[i] = make_contiguous(grads[i]);
    at.apart(params[i], "params", grads[i], "grads");
    fill_state(at, i, t);
    t.param = params[i].mutable_data_ptr();
    t.grad = grads[i].const_data_ptr();
  }
  const Device device = device_of(first);
  const StepParams step_params{.hyper = hyper,
                               .n_tensors = static_cast<std::int64_t>(tensors.size()),
                               .tensors = tensors.data()};
  checks.status((device.backend.*op)(step_params, device.context));
}

template <class StepParams, int kMoments = StepParams::Tensor::kMoments>
void run_32bit(const Checks& checks, const typename StepParams::Hyper& hyper, Tensors& params,
               Tensors& grads, const StateLists<kMoments>& moments,
               Status (*Backend::*op)(const StepParams&, const Context&)) {
  check_length(checks, grads, "grads", params);
  for (const StateList& list : moments) check_length(checks, list.tensors, list.name, params);
  run(checks, hyper, params, grads, op, [&](const Indexed& at, std::size_t i, auto& t) {
    for (std::size_t j = 0; j < kMoments; ++j) {
      const auto& [name, list] = moments[j];
      at.state(list[i], name, ScalarType::Float, sizes_of(params[i]));
      at.apart(list[i], name, params[i], "params");
      at.apart(list[i], name, grads[i], "grads");
      for (std::size_t k = 0; k < j; ++k) {
        at.apart(list[i], name, moments[k].tensors[i], moments[k].name);
      }
      t.moments[j] = static_cast<float*>(list[i].mutable_data_ptr());
    }
  });
}

template <class StepParams, int kMoments = StepParams::Tensor::kMoments>
void run_8bit(const Checks& checks, const typename StepParams::Hyper& hyper, Tensors& params,
              Tensors& grads, const StateLists<kMoments>& codes, const StateLists<kMoments>& absmax,
              Status (*Backend::*op)(const StepParams&, const Context&)) {
  check_length(checks, grads, "grads", params);
  for (const StateList& list : codes) check_length(checks, list.tensors, list.name, params);
  for (const StateList& list : absmax) check_length(checks, list.tensors, list.name, params);
  run(checks, hyper, params, grads, op, [&](const Indexed& at, std::size_t i, auto& t) {
    const Shape blocks{n_blocks(t.n, kOptimizerBlocksize)};
    for (std::size_t j = 0; j < kMoments; ++j) {
      const auto& [codes_name, codes_list] = codes[j];
      const auto& [absmax_name, absmax_list] = absmax[j];
      at.state(codes_list[i], codes_name, ScalarType::Byte, sizes_of(params[i]));
      at.state(absmax_list[i], absmax_name, ScalarType::Float, blocks);
      at.apart(codes_list[i], codes_name, params[i], "params");
      for (std::size_t k = 0; k < j; ++k) {
        at.apart(codes_list[i], codes_name, codes[k].tensors[i], codes[k].name);
        at.apart(absmax_list[i], absmax_name, absmax[k].tensors[i], absmax[k].name);
      }
      t.codes[j] = static_cast<std::uint8_t*>(codes_list[i].mutable_data_ptr());
      t.absmax[j] = static_cast<float*>(absmax_list[i].mutable_data_ptr());
    }
  });
}

AdamwHyper adamw_hyper(const Checks& checks, double lr, double beta1, double beta2, double eps,
                       double weight_decay, std::int64_t step) {
  checks.in_range(lr, "lr", 0.0, kNoLimit);
  checks.in_range(beta1, "beta1", 0.0, 1.0);
  checks.in_range(beta2, "beta2", 0.0, 1.0);
  checks.in_range(eps, "eps", 0.0, kNoLimit);
  checks.in_range(weight_decay, "weight_decay", 0.0, kNoLimit);
  if (step < 1) checks.fail("step", "be 1 or more", std::to_string(step));
  return {.lr = lr,
          .beta1 = beta1,
          .beta2 = beta2,
          .eps = eps,
          .weight_decay = weight_decay,
          .step = step,
          .maximize = false,
          .grad_scale = nullptr,
          .found_inf = nullptr};
}

LionHyper lion_hyper(const Checks& checks, double lr, double beta1, double beta2,
                     double weight_decay) {
  checks.in_range(lr, "lr", 0.0, kNoLimit);
  checks.in_range(beta1, "beta1", 0.0, 1.0);
  checks.in_range(beta2, "beta2", 0.0, 1.0);
  checks.in_range(weight_decay, "weight_decay", 0.0, kNoLimit);
  return {.lr = lr,
          .beta1 = beta1,
          .beta2 = beta2,
          .weight_decay = weight_decay,
          .maximize = false,
          .grad_scale = nullptr,
          .found_inf = nullptr};
}

SgdHyper sgd_hyper(const Checks& checks, double lr, double momentum, double dampening,
                   double weight_decay, bool nesterov, bool first_step) {
  checks.in_range(lr, "lr", 0.0, kNoLimit);
  checks.in_range(momentum, "momentum", 0.0, kNoLimit);
  checks.in_range(dampening, "dampening", 0.0, 1.0);
  checks.in_range(weight_decay, "weight_decay", 0.0, kNoLimit);
  return {.lr = lr,
          .momentum = momentum,
          .dampening = dampening,
          .weight_decay = weight_decay,
          .nesterov = nesterov,
          .first_step = first_step,
          .maximize = false,
          .grad_scale = nullptr,
          .found_inf = nullptr};
}

}  // namespace

void adamw_step(Tensors params, Tensors grads, Tensors exp_avg, Tensors exp_avg_sq, double lr,
                double beta1, double beta2, double eps, double weight_decay, std::int64_t step,
                bool maximize, OptionalTensor grad_scale, OptionalTensor found_inf) {
  const Checks checks("adamw_step");
  const auto hyper =
      with_gradient(checks, adamw_hyper(checks, lr, beta1, beta2, eps, weight_decay, step),
                    maximize, grad_scale, found_inf, params);
  run_32bit<AdamwStepParams>(checks, hyper, params, grads,
                             {{{"exp_avg", exp_avg}, {"exp_avg_sq", exp_avg_sq}}},
                             &Backend::adamw_step);
}

void adamw_8bit_step(Tensors params, Tensors grads, Tensors exp_avg, Tensors exp_avg_sq,
                     Tensors exp_avg_absmax, Tensors exp_avg_sq_absmax, double lr, double beta1,
                     double beta2, double eps, double weight_decay, std::int64_t step,
                     bool maximize, OptionalTensor grad_scale, OptionalTensor found_inf) {
  const Checks checks("adamw_8bit_step");
  const auto hyper =
      with_gradient(checks, adamw_hyper(checks, lr, beta1, beta2, eps, weight_decay, step),
                    maximize, grad_scale, found_inf, params);
  run_8bit<Adamw8bitStepParams>(
      checks, hyper, params, grads, {{{"exp_avg", exp_avg}, {"exp_avg_sq", exp_avg_sq}}},
      {{{"exp_avg_absmax", exp_avg_absmax}, {"exp_avg_sq_absmax", exp_avg_sq_absmax}}},
      &Backend::adamw_8bit_step);
}

void lion_step(Tensors params, Tensors grads, Tensors exp_avg, double lr, double beta1,
               double beta2, double weight_decay, bool maximize, OptionalTensor grad_scale,
               OptionalTensor found_inf) {
  const Checks checks("lion_step");
  const auto hyper = with_gradient(checks, lion_hyper(checks, lr, beta1, beta2, weight_decay),
                                   maximize, grad_scale, found_inf, params);
  run_32bit<LionStepParams>(checks, hyper, params, grads, {{{"exp_avg", exp_avg}}},
                            &Backend::lion_step);
}

void lion_8bit_step(Tensors params, Tensors grads, Tensors exp_avg, Tensors exp_avg_absmax,
                    double lr, double beta1, double beta2, double weight_decay, bool maximize,
                    OptionalTensor grad_scale, OptionalTensor found_inf) {
  const Checks checks("lion_8bit_step");
  const auto hyper = with_gradient(checks, lion_hyper(checks, lr, beta1, beta2, weight_decay),
                                   maximize, grad_scale, found_inf, params);
  run_8bit<Lion8bitStepParams>(checks, hyper, params, grads, {{{"exp_avg", exp_avg}}},
                               {{{"exp_avg_absmax", exp_avg_absmax}}}, &Backend::lion_8bit_step);
}

void sgd_step(Tensors params, Tensors grads, Tensors momentum_buffer, double lr, double momentum,
              double dampening, double weight_decay, bool nesterov, bool first_step, bool maximize,
              OptionalTensor grad_scale, OptionalTensor found_inf) {
  const Checks checks("sgd_step");
  const auto hyper = with_gradient(
      checks, sgd_hyper(checks, lr, momentum, dampening, weight_decay, nesterov, first_step),
      maximize, grad_scale, found_inf, params);
  run_32bit<SgdStepParams>(checks, hyper, params, grads, {{{"momentum_buffer", momentum_buffer}}},
                           &Backend::sgd_step);
}

void sgd_8bit_step(Tensors params, Tensors grads, Tensors momentum_buffer,
                   Tensors momentum_buffer_absmax, double lr, double momentum, double dampening,
                   double weight_decay, bool nesterov, bool first_step, bool maximize,
                   OptionalTensor grad_scale, OptionalTensor found_inf) {
  const Checks checks("sgd_8bit_step");
  const auto hyper = with_gradient(
      checks, sgd_hyper(checks, lr, momentum, dampening, weight_decay, nesterov, first_step),
      maximize, grad_scale, found_inf, params);
  run_8bit<Sgd8bitStepParams>(
      checks, hyper, params, grads, {{{"momentum_buffer", momentum_buffer}}},
      {{{"momentum_buffer_absmax", momentum_buffer_absmax}}}, &Backend::sgd_8bit_step);
}

}  // namespace qlora::torch_ops
