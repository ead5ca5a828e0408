// One Lion update of kWidth values (Chen et al., 2023, algorithm 2):
//
//   c  = beta1 m + (1 - beta1) g
//   p  = p (1 - lr weight_decay) - lr sign(c)         sign(0) = sign(NaN) = 0
//   m  = beta2 m + (1 - beta2) g
#pragma once

#include "gradient_inl.h"
#include "qlora_native/params.h"

namespace qlora::cpu {

template <class V>
class LionRule {
 public:
  using F = typename V::F;
  static constexpr int kMoments = 1;

  explicit LionRule(const LionHyper& h)
      : gradient(h),
        beta1_(factor<V>(h.beta1)),
        one_minus_beta1_(factor<V>(1.0 - h.beta1)),
        beta2_(factor<V>(h.beta2)),
        one_minus_beta2_(factor<V>(1.0 - h.beta2)),
        decay_(factor<V>(1.0 - h.lr * h.weight_decay)),
        lr_(factor<V>(h.lr)) {}

  // The new parameter; the moment becomes new.
  [[nodiscard, gnu::always_inline]] F step(F p, F g, F (&moments)[kMoments]) const {
    F& m = moments[0];
    const F direction = V::add(V::mul(beta1_, m), V::mul(one_minus_beta1_, g));
    m = V::add(V::mul(beta2_, m), V::mul(one_minus_beta2_, g));
    return V::sub(V::mul(p, decay_), V::mul(lr_, V::sign(direction)));
  }

  Gradient<V> gradient;

 private:
  F beta1_, one_minus_beta1_;
  F beta2_, one_minus_beta2_;
  F decay_;
  F lr_;
};

}  // namespace qlora::cpu
