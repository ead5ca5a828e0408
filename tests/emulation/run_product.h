// Runs the products of a way on the emulator, forward and input gradient, under three orders of
// threads, and prints a digest of their results for each, or the first fault: what the tests of
// tests/python compare a mutant with.
#pragma once

#include <cstddef>
#include <cstdint>

#include "launch/linear_paths.h"
#include "run_orders.h"
#include "run_weight.h"

namespace emulated_run {

struct Case {
  std::int64_t m, n, k, blocksize;
  bool double_quantized;
  DType dtype;
  std::int64_t r;  // of the LoRA term
  float dropout;
};

using Forward = Status (*)(const LinearParams&, const cuda::LoraTerm*, const Context&);
using Backward = Status (*)(const LinearBackwardInputParams&, const cuda::LoraTerm*,
                            const Context&);

template <Forward kForward, Backward kBackward>
void run(const Case& c) {
  const RunWeight weight(c.n, c.k, c.blocksize, c.double_quantized);
  const Buffer x = values(c.m * c.k, c.dtype, 0), grad_out = values(c.m * c.n, c.dtype, 0);
  const Buffer left = values(c.m * c.r, c.dtype, 0), bias = values(c.n, c.dtype, 1);
  const Buffer b = values(c.n * c.r, c.dtype, 0), a = values(c.k * c.r, c.dtype, 0);
  const Buffer out(c.m * c.n, size_of(c.dtype), 1), grad_x(c.m * c.k, size_of(c.dtype), 0);
  const std::int64_t seed = 7;
  const cuda::LoraTerm forward{.r = c.r, .left = left.as<void>(), .right = b.as<void>()};
  const cuda::LoraTerm back{.r = c.r,
                            .left = left.as<void>(),
                            .right = a.as<void>(),
                            .dropout_p = c.dropout,
                            .dropout_seed = &seed};
  check(kForward({.m = c.m,
                  .weight = weight.weight(),
                  .dtype = c.dtype,
                  .x = x.as<void>(),
                  .bias = bias.as<void>(),
                  .out = out.as<void>()},
                 c.r > 0 ? &forward : nullptr, {}));
  check(kBackward({.m = c.m,
                   .weight = weight.weight(),
                   .dtype = c.dtype,
                   .grad_out = grad_out.as<void>(),
                   .grad_x = grad_x.as<void>()},
                  c.r > 0 ? &back : nullptr, {}));
  out.digest();
  grad_x.digest();
}

template <Forward kForward, Backward kBackward, std::size_t kCases>
void run_all(const Case (&cases)[kCases]) {
  print_digests([&] {
    for (const Case& c : cases) run<kForward, kBackward>(c);
  });
}

}  // namespace emulated_run
