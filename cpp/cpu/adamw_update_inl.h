// One AdamW update of kWidth values (Loshchilov & Hutter, 2019), in torch.optim.AdamW's order:
//
//   g  = grad / grad_scale, negated to maximize
//   m  = beta1 m + (1 - beta1) g
//   v  = beta2 v + (1 - beta2) g^2
//   p  = p (1 - lr weight_decay) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//
// in fp32, from factors that are computed in double and rounded once. No product is fused with a
// sum: the kernels wait for memory, so that it would save nothing, and apart every instruction set
// gives the same bits as the formula written in torch does.
#pragma once

#include <cmath>
#include <cstdint>

#include "qlora_native/params.h"

namespace qlora::cpu {

// The step is left out where GradScaler found a gradient that is not finite.
[[nodiscard]] inline bool is_skipped(const AdamwHyper& hyper) {
  return hyper.found_inf != nullptr && *hyper.found_inf != 0.0f;
}

template <class V>
class AdamwUpdate {
 public:
  using F = typename V::F;

  explicit AdamwUpdate(const AdamwHyper& h)
      : maximize_(h.maximize),
        scaled_(h.grad_scale != nullptr),
        grad_scale_(V::set1(scaled_ ? *h.grad_scale : 1.0f)),
        beta1_(splat(h.beta1)),
        one_minus_beta1_(splat(1.0 - h.beta1)),
        beta2_(splat(h.beta2)),
        one_minus_beta2_(splat(1.0 - h.beta2)),
        decay_(splat(1.0 - h.lr * h.weight_decay)),
        step_size_(splat(h.lr / correction(h.beta1, h.step))),
        inv_sqrt_correction2_(splat(1.0 / std::sqrt(correction(h.beta2, h.step)))),
        eps_(splat(h.eps)) {}

  [[nodiscard, gnu::always_inline]] F gradient(F grad) const {
    if (scaled_) grad = V::div(grad, grad_scale_);
    return maximize_ ? V::sub(V::zero(), grad) : grad;
  }

  [[nodiscard, gnu::always_inline]] F first_moment(F m, F g) const {
    return V::add(V::mul(beta1_, m), V::mul(one_minus_beta1_, g));
  }

  [[nodiscard, gnu::always_inline]] F second_moment(F v, F g) const {
    return V::add(V::mul(beta2_, v), V::mul(V::mul(one_minus_beta2_, g), g));
  }

  [[nodiscard, gnu::always_inline]] F param(F p, F m, F v) const {
    const F denominator = V::add(V::mul(V::sqrt(v), inv_sqrt_correction2_), eps_);
    return V::sub(V::mul(p, decay_), V::mul(step_size_, V::div(m, denominator)));
  }

 private:
  static F splat(double value) { return V::set1(static_cast<float>(value)); }

  static double correction(double beta, std::int64_t step) {
    return 1.0 - std::pow(beta, static_cast<double>(step));
  }

  bool maximize_;
  bool scaled_;
  F grad_scale_;
  F beta1_, one_minus_beta1_;
  F beta2_, one_minus_beta2_;
  F decay_;
  F step_size_;
  F inv_sqrt_correction2_;
  F eps_;
};

}  // namespace qlora::cpu
