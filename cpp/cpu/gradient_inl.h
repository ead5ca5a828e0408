// How every optimizer takes a gradient in: divided by GradScaler's scale, negated to maximize.
#pragma once

namespace qlora::cpu {

// The step is left out where GradScaler found a gradient that is not finite.
template <class Hyper>
[[nodiscard]] bool is_skipped(const Hyper& hyper) {
  return hyper.found_inf != nullptr && *hyper.found_inf != 0.0f;
}

template <class V>
class Gradient {
 public:
  using F = typename V::F;

  template <class Hyper>
  explicit Gradient(const Hyper& h)
      : maximize_(h.maximize),
        scaled_(h.grad_scale != nullptr),
        scale_(V::set1(scaled_ ? *h.grad_scale : 1.0f)) {}

  [[nodiscard, gnu::always_inline]] F operator()(F grad) const {
    if (scaled_) grad = V::div(grad, scale_);
    return maximize_ ? V::sub(V::zero(), grad) : grad;
  }

 private:
  bool maximize_;
  bool scaled_;
  F scale_;
};

// A factor, computed in double and rounded once.
template <class V>
typename V::F factor(double value) {
  return V::set1(static_cast<float>(value));
}

}  // namespace qlora::cpu
