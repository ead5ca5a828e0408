// The optimizers' steps on every instruction set, against the scalar path: the same bits, at every
// length of a tail, for all pairs of dtypes, with gradients that are not finite among them, and not
// a byte beside the outputs.
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

template <class Hyper>
Hyper hyper_of(const Case& c, const float* grad_scale);
template <>
AdamwHyper hyper_of(const Case& c, const float* grad_scale) {
  return {.lr = 3e-3,
          .beta1 = 0.9,
          .beta2 = 0.995,
          .eps = 1e-8,
          .weight_decay = 0.02,
          .step = 3,
          .maximize = c.maximize,
          .grad_scale = grad_scale,
          .found_inf = nullptr};
}
template <>
LionHyper hyper_of(const Case& c, const float* grad_scale) {
  return {.lr = 3e-4,
          .beta1 = 0.9,
          .beta2 = 0.99,
          .weight_decay = 0.02,
          .maximize = c.maximize,
          .grad_scale = grad_scale,
          .found_inf = nullptr};
}
template <>
SgdHyper hyper_of(const Case& c, const float* grad_scale) {
  return {.lr = 3e-2,
          .momentum = 0.9,
          .dampening = 0.1,
          .weight_decay = 0.02,
          .nesterov = c.n % 2 == 0,
          .first_step = c.n % 5 == 0,
          .maximize = c.maximize,
          .grad_scale = grad_scale,
          .found_inf = nullptr};
}

// A parameter, its moments or their codes, and the codes' scales.
std::vector<Output> make_state(Random& random, const Case& c, int moments, bool is_8bit) {
  std::vector<Output> state;
  state.emplace_back(unit_values(random, c.n, c.param_dtype));
  for (int j = 0; j < moments; ++j) {
    if (is_8bit) {
      Bytes codes(static_cast<std::size_t>(c.n));
      for (auto& code : codes) code = static_cast<std::uint8_t>(random.bits() >> 24);
      state.emplace_back(codes);
    } else {
      state.emplace_back(make_values(c.n, DType::float32, [&] {
        return is_signed_moment(j) ? random.unit() : std::fabs(random.unit());
      }));
    }
  }
  for (int j = 0; is_8bit && j < moments; ++j) {
    state.emplace_back(make_values(n_blocks(c.n, kOptimizerBlocksize), DType::float32,
                                   [&] { return std::fabs(random.unit()); }));
  }
  return state;
}

// One step; what is in the state afterwards.
template <class Params>
std::vector<Output> run(const Case& c, Status (*op)(const Params&, const Context&),
                        const Context& context) {
  using Tensor = typename Params::Tensor;
  constexpr bool kIs8bit = requires(Tensor t) { t.codes; };
  Random random;
  const Bytes grad = random_values(random, c.n, c.grad_dtype);
  std::vector<Output> state = make_state(random, c, Tensor::kMoments, kIs8bit);
  Tensor tensor{};
  tensor.n = c.n;
  tensor.param_dtype = c.param_dtype;
  tensor.grad_dtype = c.grad_dtype;
  tensor.param = state[0].template as<void>();
  tensor.grad = grad.data();
  for (std::size_t j = 0; j < Tensor::kMoments; ++j) {
    if constexpr (kIs8bit) {
      tensor.codes[j] = state[1 + j].template as<std::uint8_t>();
      tensor.absmax[j] = state[1 + Tensor::kMoments + j].template as<float>();
    } else {
      tensor.moments[j] = state[1 + j].template as<float>();
    }
  }
  const float grad_scale = 3.0f;
  const auto hyper = hyper_of<typename Params::Hyper>(c, c.scaled ? &grad_scale : nullptr);
  if (const Status status = op({hyper, 1, &tensor}, context); !status.ok())
    fail("%s", status.message);
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

template <class Params>
void compare(const Case& c, const char* isa, const char* name,
             Status (*Backend::*op)(const Params&, const Context&)) {
  constexpr bool kIs8bit = requires(typename Params::Tensor t) { t.codes; };
  cpu::force_isa("scalar");
  const std::vector<Output> wanted = run(c, cpu::backend().*op, Context{});
  cpu::force_isa(isa);
  for (const Context& context : {Context{}, three_threads()}) {
    const std::vector<Output> got = run(c, cpu::backend().*op, context);
    for (std::size_t i = 0; i < got.size(); ++i) {
      const bool is_codes = kIs8bit && i >= 1 && i <= Params::Tensor::kMoments;
      const bool equal = is_codes
                             ? got[i].buffer == wanted[i].buffer
                             : same(got[i], wanted[i], i == 0 ? c.param_dtype : DType::float32);
      if (!equal || !got[i].intact()) {
        fail("%s %s n=%lld, state %zu: %s", isa, name, number(c.n), i,
             equal ? "wrote outside its output" : "differs from scalar");
      }
    }
  }
  count_case();
}

void compare_all(const Case& c, const char* isa) {
  compare(c, isa, "adamw_step", &Backend::adamw_step);
  compare(c, isa, "adamw_8bit_step", &Backend::adamw_8bit_step);
  compare(c, isa, "lion_step", &Backend::lion_step);
  compare(c, isa, "lion_8bit_step", &Backend::lion_8bit_step);
  compare(c, isa, "sgd_step", &Backend::sgd_step);
  compare(c, isa, "sgd_8bit_step", &Backend::sgd_8bit_step);
}

}  // namespace

int main() {
  return on_each_isa([](const char* isa) {
    for (const DType param_dtype : kDTypes) {
      for (const DType grad_dtype : kDTypes) {
        for (std::int64_t n = 0; n <= 40; ++n) {
          compare_all({n, param_dtype, grad_dtype, n % 3 == 1, n % 2 == 1}, isa);
        }
        for (const std::int64_t n : {255, 256, 257, 523, 70001}) {
          compare_all({n, param_dtype, grad_dtype, false, false}, isa);
        }
      }
    }
  });
}
