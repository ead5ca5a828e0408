// Runs the tiled products on the emulator, forward and input gradient, and prints a digest of their
// results, or the first fault: what tests/python/test_linear_tiles.py compares a mutant with.
#include <cstdint>
#include <cstdio>

#include "launch/linear_paths.h"
#include "machine.h"
#include "run_weight.h"

namespace {

using namespace emulated_run;

struct Case {
  std::int64_t m, n, k, blocksize;
  bool double_quantized;
  DType dtype;
  std::int64_t r;  // of the LoRA term
  float dropout;
};

// More steps than the ring holds and a tail in both directions; two of LoRA's panels; tiles of 64
// and of 128 rows, a tail of rows.
constexpr Case kCases[] = {
    {20, 296, 352, 64, true, DType::bfloat16, 80, 0.25f},
    {70, 136, 160, 32, false, DType::float16, 0, 0.0f},
    {9, 72, 96, 128, true, DType::bfloat16, 0, 0.0f},
};

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
  check(cuda::linear_tiles({.m = c.m,
                            .weight = weight.weight(),
                            .dtype = c.dtype,
                            .x = x.as<void>(),
                            .bias = bias.as<void>(),
                            .out = out.as<void>()},
                           c.r > 0 ? &forward : nullptr, {}));
  check(cuda::backward_input_tiles({.m = c.m,
                                    .weight = weight.weight(),
                                    .dtype = c.dtype,
                                    .grad_out = grad_out.as<void>(),
                                    .grad_x = grad_x.as<void>()},
                                   c.r > 0 ? &back : nullptr, {}));
  out.digest();
  grad_x.digest();
}

}  // namespace

int main() {
  for (const std::uint64_t seed : {0, 1, 2}) {
    emulation::Machine::instance().set_seed(seed);
    digest = 0xCBF29CE484222325ull;
    for (const Case& c : kCases) run(c);
    std::printf("%016llx\n", static_cast<unsigned long long>(digest));
  }
}
