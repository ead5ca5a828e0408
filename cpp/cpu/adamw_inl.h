// One AdamW update of kWidth values (Loshchilov & Hutter, 2019), in torch.optim.AdamW's order:
//
//   m  = beta1 m + (1 - beta1) g
//   v  = beta2 v + (1 - beta2) g^2
//   p  = p (1 - lr weight_decay) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//
// in fp32. No product is fused with a sum, in this rule or another: the kernels wait for memory, so
// that it would save nothing, and apart every instruction set gives the same bits as the formula
// written in torch does.
#pragma once

#include <cmath>
#include <cstdint>

#include "gradient_inl.h"
#include "qlora_native/params.h"

namespace qlora::cpu {

template <class V>
class AdamwRule {
 public:
  using F = typename V::F;
  static constexpr int kMoments = 2;

  explicit AdamwRule(const AdamwHyper& h)
      : gradient(h),
        beta1_(factor<V>(h.beta1)),
        one_minus_beta1_(factor<V>(1.0 - h.beta1)),
        beta2_(factor<V>(h.beta2)),
        one_minus_beta2_(factor<V>(1.0 - h.beta2)),
        decay_(factor<V>(1.0 - h.lr * h.weight_decay)),
        step_size_(factor<V>(h.lr / correction(h.beta1, h.step))),
        inv_sqrt_correction2_(factor<V>(1.0 / std::sqrt(correction(h.beta2, h.step)))),
        eps_(factor<V>(h.eps)) {}

  // The new parameter; the moments become new.
  [[nodiscard, gnu::always_inline]] F step(F p, F g, F (&moments)[kMoments]) const {
    F& m = moments[0];
    F& v = moments[1];
    m = V::add(V::mul(beta1_, m), V::mul(one_minus_beta1_, g));
    v = V::add(V::mul(beta2_, v), V::mul(V::mul(one_minus_beta2_, g), g));
    const F denominator = V::add(V::mul(V::sqrt(v), inv_sqrt_correction2_), eps_);
    return V::sub(V::mul(p, decay_), V::mul(step_size_, V::div(m, denominator)));
  }

  Gradient<V> gradient;

 private:
  static double correction(double beta, std::int64_t step) {
    return 1.0 - std::pow(beta, static_cast<double>(step));
  }

  F beta1_, one_minus_beta1_;
  F beta2_, one_minus_beta2_;
  F decay_;
  F step_size_;
  F inv_sqrt_correction2_;
  F eps_;
};

}  // namespace qlora::cpu
