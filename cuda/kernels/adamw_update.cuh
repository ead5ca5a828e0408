// One AdamW update of one value, operation by operation as cpp/cpu/adamw_inl.h writes it down:
// fp32, each operation rounded (the build forbids a contraction).
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/gradient.cuh"
#include "qlora_native/params.h"

namespace qlora::cuda {

struct AdamwRule {
  static constexpr int kMoments = 2;

  Gradient gradient;
  float beta1, one_minus_beta1;
  float beta2, one_minus_beta2;
  float decay;
  float step_size;
  float inv_sqrt_correction2;
  float eps;

  // The new parameter; the moments become new.
  [[nodiscard]] __device__ float step(float p, float g, float (&moments)[kMoments]) const {
    float& m = moments[0];
    float& v = moments[1];
    m = beta1 * m + one_minus_beta1 * g;
    v = beta2 * v + one_minus_beta2 * g * g;
    const float denominator = sqrtf(v) * inv_sqrt_correction2 + eps;
    return p * decay - step_size * (m / denominator);
  }
};

inline AdamwRule rule_of(const AdamwHyper& h) {
  const auto correction = [&](double beta) {
    return 1.0 - std::pow(beta, static_cast<double>(h.step));
  };
  return {.gradient = gradient_of(h),
          .beta1 = factor(h.beta1),
          .one_minus_beta1 = factor(1.0 - h.beta1),
          .beta2 = factor(h.beta2),
          .one_minus_beta2 = factor(1.0 - h.beta2),
          .decay = factor(1.0 - h.lr * h.weight_decay),
          .step_size = factor(h.lr / correction(h.beta1)),
          .inv_sqrt_correction2 = factor(1.0 / std::sqrt(correction(h.beta2))),
          .eps = factor(h.eps)};
}

}  // namespace qlora::cuda
