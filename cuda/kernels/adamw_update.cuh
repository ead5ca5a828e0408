// One AdamW update of one value, operation by operation as cpp/cpu/adamw_update_inl.h writes it
// down: fp32, each operation rounded, from factors that are computed in double and rounded once.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "device/global.cuh"
#include "qlora_native/params.h"

namespace qlora::cuda {

struct AdamwFactors {
  float beta1, one_minus_beta1;
  float beta2, one_minus_beta2;
  float decay;
  float step_size;
  float inv_sqrt_correction2;
  float eps;
  bool maximize;
  bool has_grad_scale;
  bool has_found_inf;
  Global<const float> grad_scale;  // [1]
  Global<const float> found_inf;   // [1]
};

inline AdamwFactors adamw_factors(const AdamwHyper& h) {
  const auto rounded = [](double value) { return static_cast<float>(value); };
  const auto correction = [&](double beta) {
    return 1.0 - std::pow(beta, static_cast<double>(h.step));
  };
  return {.beta1 = rounded(h.beta1),
          .one_minus_beta1 = rounded(1.0 - h.beta1),
          .beta2 = rounded(h.beta2),
          .one_minus_beta2 = rounded(1.0 - h.beta2),
          .decay = rounded(1.0 - h.lr * h.weight_decay),
          .step_size = rounded(h.lr / correction(h.beta1)),
          .inv_sqrt_correction2 = rounded(1.0 / std::sqrt(correction(h.beta2))),
          .eps = rounded(h.eps),
          .maximize = h.maximize,
          .has_grad_scale = h.grad_scale != nullptr,
          .has_found_inf = h.found_inf != nullptr,
          .grad_scale = {h.grad_scale, h.grad_scale != nullptr ? 1 : 0},
          .found_inf = {h.found_inf, h.found_inf != nullptr ? 1 : 0}};
}

// The step is left out where GradScaler found a gradient that is not finite. Read on the device:
// the host must not wait for it.
__device__ inline bool is_skipped(const AdamwFactors& f) {
  return f.has_found_inf && f.found_inf.load(0) != 0.0f;
}

__device__ inline float grad_scale_of(const AdamwFactors& f) {
  return f.has_grad_scale ? f.grad_scale.load(0) : 1.0f;
}

struct Moments {
  float first, second;
};

__device__ inline float adamw_gradient(const AdamwFactors& f, float grad, float grad_scale) {
  if (f.has_grad_scale) grad = grad / grad_scale;
  return f.maximize ? 0.0f - grad : grad;
}

__device__ inline Moments adamw_moments(const AdamwFactors& f, Moments old, float g) {
  return {f.beta1 * old.first + f.one_minus_beta1 * g,
          f.beta2 * old.second + f.one_minus_beta2 * g * g};
}

__device__ inline float adamw_param(const AdamwFactors& f, float p, Moments m) {
  const float denominator = sqrtf(m.second) * f.inv_sqrt_correction2 + f.eps;
  return p * f.decay - f.step_size * (m.first / denominator);
}

__device__ inline bool is_finite(float x) {
  return (std::bit_cast<std::uint32_t>(x) & 0x7F800000u) != 0x7F800000u;
}

}  // namespace qlora::cuda
