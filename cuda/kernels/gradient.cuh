// How every optimizer takes a gradient in, as cpp/cpu/gradient_inl.h has it, and how the host makes
// a rule's factors: in double, rounded once.
#pragma once

#include "device/global.cuh"

namespace qlora::cuda {

struct Gradient {
  bool maximize;
  bool has_grad_scale;
  bool has_found_inf;
  Global<const float> grad_scale;  // [1]
  Global<const float> found_inf;   // [1]

  // The step is left out where GradScaler found a gradient that is not finite. Read on the device:
  // the host must not wait for it.
  [[nodiscard]] __device__ bool skips() const { return has_found_inf && found_inf.load(0) != 0.0f; }

  [[nodiscard]] __device__ float scale() const {
    return has_grad_scale ? grad_scale.load(0) : 1.0f;
  }

  [[nodiscard]] __device__ float take(float grad, float scale) const {
    if (has_grad_scale) grad = grad / scale;
    return maximize ? 0.0f - grad : grad;
  }
};

template <class Hyper>
Gradient gradient_of(const Hyper& h) {
  return {.maximize = h.maximize,
          .has_grad_scale = h.grad_scale != nullptr,
          .has_found_inf = h.found_inf != nullptr,
          .grad_scale = {h.grad_scale, h.grad_scale != nullptr ? 1 : 0},
          .found_inf = {h.found_inf, h.found_inf != nullptr ? 1 : 0}};
}

inline float factor(double value) { return static_cast<float>(value); }

}  // namespace qlora::cuda
