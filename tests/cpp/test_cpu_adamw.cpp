// AdamW on every instruction set, against the scalar path: the same bits, at every length of a
// tail, for all pairs of dtypes, with gradients that are not finite among them, and not a byte
// beside the outputs.
#include <cmath>
#include <cstdint>
#include <vector>

#include "support.h"

namespace {

using namespace qlora;
using namespace qlora::test;

struct Case {
  std::int64_t n;
  DType param_dtype, grad_dtype;
  bool maximize, scaled;
};

AdamwHyper hyper_of(const Case& c, const float& grad_scale) {
  return {.lr = 3e-3,
          .beta1 = 0.9,
          .beta2 = 0.995,
          .eps = 1e-8,
          .weight_decay = 0.02,
          .step = 3,
          .maximize = c.maximize,
          .grad_scale = c.scaled ? &grad_scale : nullptr,
          .found_inf = nullptr};
}

// One step; param, moments and scales as they came out.
std::vector<Output> step_32bit(const Case& c, const Context& context) {
  Random random;
  const Bytes grad = random_values(random, c.n, c.grad_dtype);
  std::vector<Output> state;
  state.emplace_back(unit_values(random, c.n, c.param_dtype));
  state.emplace_back(unit_values(random, c.n, DType::float32));
  state.emplace_back(make_values(c.n, DType::float32, [&] { return std::fabs(random.unit()); }));
  const AdamwTensor tensor{.n = c.n,
                           .param_dtype = c.param_dtype,
                           .grad_dtype = c.grad_dtype,
                           .param = state[0].as<void>(),
                           .grad = grad.data(),
                           .exp_avg = state[1].as<float>(),
                           .exp_avg_sq = state[2].as<float>()};
  const float grad_scale = 3.0f;
  const Status status = cpu::backend().adamw_step({hyper_of(c, grad_scale), 1, &tensor}, context);
  if (!status.ok()) fail("adamw_step: %s", status.message);
  return state;
}

std::vector<Output> step_8bit(const Case& c, const Context& context) {
  Random random;
  const Bytes grad = random_values(random, c.n, c.grad_dtype);
  const std::int64_t blocks = n_blocks(c.n, kOptimizerBlocksize);
  const auto codes = [&] {
    Bytes bytes(static_cast<std::size_t>(c.n));
    for (auto& byte : bytes) byte = static_cast<std::uint8_t>(random.bits() >> 24);
    return bytes;
  };
  const auto scales = [&] {
    return make_values(blocks, DType::float32, [&] { return std::fabs(random.unit()); });
  };
  std::vector<Output> state;
  state.emplace_back(unit_values(random, c.n, c.param_dtype));
  state.emplace_back(codes());
  state.emplace_back(codes());
  state.emplace_back(scales());
  state.emplace_back(scales());
  const Adamw8bitTensor tensor{.n = c.n,
                               .param_dtype = c.param_dtype,
                               .grad_dtype = c.grad_dtype,
                               .param = state[0].as<void>(),
                               .grad = grad.data(),
                               .exp_avg = state[1].as<std::uint8_t>(),
                               .exp_avg_sq = state[2].as<std::uint8_t>(),
                               .exp_avg_absmax = state[3].as<float>(),
                               .exp_avg_sq_absmax = state[4].as<float>()};
  const float grad_scale = 3.0f;
  const Status status =
      cpu::backend().adamw_8bit_step({hyper_of(c, grad_scale), 1, &tensor}, context);
  if (!status.ok()) fail("adamw_8bit_step: %s", status.message);
  return state;
}

// Equal bits, or NaN on both sides: which of two NaNs a sum hands on is the compiler's choice.
bool same(const Output& a, const Output& b, DType dtype) {
  const auto size = static_cast<std::size_t>(size_of(dtype));
  for (std::size_t i = 0; i + size <= a.size; i += size) {
    const bool nan = std::isnan(get(a.data() + i, dtype)) && std::isnan(get(b.data() + i, dtype));
    if (!nan && std::memcmp(a.data() + i, b.data() + i, size) != 0) return false;
  }
  return true;
}

void compare(const Case& c, const char* isa, const char* op, bool codes,
             std::vector<Output> (*step)(const Case&, const Context&)) {
  cpu::force_isa("scalar");
  const std::vector<Output> wanted = step(c, Context{});
  cpu::force_isa(isa);
  for (const Context& context : {Context{}, three_threads()}) {
    const std::vector<Output> got = step(c, context);
    for (std::size_t i = 0; i < got.size(); ++i) {
      const bool is_codes = codes && (i == 1 || i == 2);
      const bool equal = is_codes
                             ? got[i].buffer == wanted[i].buffer
                             : same(got[i], wanted[i], i == 0 ? c.param_dtype : DType::float32);
      if (!equal || !got[i].intact()) {
        fail("%s %s n=%lld, state %zu: %s", isa, op, number(c.n), i,
             equal ? "wrote outside its output" : "differs from scalar");
      }
    }
  }
  count_case();
}

}  // namespace

int main() {
  return on_each_isa([](const char* isa) {
    for (const DType param_dtype : kDTypes) {
      for (const DType grad_dtype : kDTypes) {
        for (std::int64_t n = 0; n <= 40; ++n) {
          const Case c{n, param_dtype, grad_dtype, n % 3 == 1, n % 2 == 1};
          compare(c, isa, "adamw_step", false, step_32bit);
          compare(c, isa, "adamw_8bit_step", true, step_8bit);
        }
        for (const std::int64_t n : {255, 256, 257, 523, 70001}) {
          const Case c{n, param_dtype, grad_dtype, false, false};
          compare(c, isa, "adamw_step", false, step_32bit);
          compare(c, isa, "adamw_8bit_step", true, step_8bit);
        }
      }
    }
  });
}
