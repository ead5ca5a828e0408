// One Lion update of one value, operation by operation as cpp/cpu/lion_inl.h writes it down.
#pragma once

#include "kernels/gradient.cuh"
#include "qlora_native/params.h"

namespace qlora::cuda {

struct LionRule {
  static constexpr int kMoments = 1;

  Gradient gradient;
  float beta1, one_minus_beta1;
  float beta2, one_minus_beta2;
  float decay;
  float lr;

  // The new parameter; the moment becomes new.
  [[nodiscard]] __device__ float step(float p, float g, float (&moments)[kMoments]) const {
    float& m = moments[0];
    const float direction = beta1 * m + one_minus_beta1 * g;
    m = beta2 * m + one_minus_beta2 * g;
    const float sign = direction > 0.0f ? 1.0f : direction < 0.0f ? -1.0f : 0.0f;
    return p * decay - lr * sign;
  }
};

inline LionRule rule_of(const LionHyper& h) {
  return {.gradient = gradient_of(h),
          .beta1 = factor(h.beta1),
          .one_minus_beta1 = factor(1.0 - h.beta1),
          .beta2 = factor(h.beta2),
          .one_minus_beta2 = factor(1.0 - h.beta2),
          .decay = factor(1.0 - h.lr * h.weight_decay),
          .lr = factor(h.lr)};
}

}  // namespace qlora::cuda
