// One update by SGD with momentum of kWidth values, in torch.optim.SGD's order:
//
//   g  = g + weight_decay p
//   m  = momentum m + (1 - dampening) g          the first step: m = g
//   p  = p - lr (g + momentum m)   nesterov,     p - lr m   else
#pragma once

#include "gradient_inl.h"
#include "qlora_native/params.h"

namespace qlora::cpu {

template <class V>
class SgdRule {
 public:
  using F = typename V::F;
  static constexpr int kMoments = 1;

  explicit SgdRule(const SgdHyper& h)
      : gradient(h),
        nesterov_(h.nesterov),
        first_step_(h.first_step),
        momentum_(factor<V>(h.momentum)),
        intake_(factor<V>(1.0 - h.dampening)),
        decay_(factor<V>(h.weight_decay)),
        lr_(factor<V>(h.lr)) {}

  // The new parameter; the moment becomes new.
  [[nodiscard, gnu::always_inline]] F step(F p, F g, F (&moments)[kMoments]) const {
    F& m = moments[0];
    g = V::add(g, V::mul(decay_, p));
    m = first_step_ ? g : V::add(V::mul(momentum_, m), V::mul(intake_, g));
    const F direction = nesterov_ ? V::add(g, V::mul(momentum_, m)) : m;
    return V::sub(p, V::mul(lr_, direction));
  }

  Gradient<V> gradient;

 private:
  bool nesterov_;
  bool first_step_;
  F momentum_;
  F intake_;
  F decay_;
  F lr_;
};

}  // namespace qlora::cpu
