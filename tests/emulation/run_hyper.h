// The settings with which the emulated optimizers step.
#pragma once

#include "qlora_native/params.h"

namespace emulated_run {

inline constexpr qlora::AdamwHyper kAdamw{.lr = 1e-3,
                                          .beta1 = 0.9,
                                          .beta2 = 0.999,
                                          .eps = 1e-8,
                                          .weight_decay = 0.01,
                                          .step = 2,
                                          .maximize = false,
                                          .grad_scale = nullptr,
                                          .found_inf = nullptr};
inline constexpr qlora::LionHyper kLion{.lr = 1e-4,
                                        .beta1 = 0.9,
                                        .beta2 = 0.99,
                                        .weight_decay = 0.01,
                                        .maximize = false,
                                        .grad_scale = nullptr,
                                        .found_inf = nullptr};
inline constexpr qlora::SgdHyper kSgd{.lr = 1e-2,
                                      .momentum = 0.9,
                                      .dampening = 0.1,
                                      .weight_decay = 0.01,
                                      .nesterov = true,
                                      .first_step = false,
                                      .maximize = false,
                                      .grad_scale = nullptr,
                                      .found_inf = nullptr};

}  // namespace emulated_run
