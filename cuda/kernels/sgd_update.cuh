// One update by SGD with momentum of one value, operation by operation as cpp/cpu/sgd_inl.h writes
// it down.
#pragma once

#include "kernels/gradient.cuh"
#include "qlora_native/params.h"

namespace qlora::cuda {

struct SgdRule {
  static constexpr int kMoments = 1;

  Gradient gradient;
  bool nesterov;
  bool first_step;
  float momentum;
  float intake;
  float decay;
  float lr;

  // The new parameter; the moment becomes new.
  [[nodiscard]] __device__ float step(float p, float g, float (&moments)[kMoments]) const {
    float& m = moments[0];
    g = g + decay * p;
    m = first_step ? g : momentum * m + intake * g;
    const float direction = nesterov ? g + momentum * m : m;
    return p - lr * direction;
  }
};

inline SgdRule rule_of(const SgdHyper& h) {
  return {.gradient = gradient_of(h),
          .nesterov = h.nesterov,
          .first_step = h.first_step,
          .momentum = factor(h.momentum),
          .intake = factor(1.0 - h.dampening),
          .decay = factor(h.weight_decay),
          .lr = factor(h.lr)};
}

}  // namespace qlora::cuda
