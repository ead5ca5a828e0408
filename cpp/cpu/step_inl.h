// An optimizer's step with 32-bit state, by any rule, over many tensors in one call.
//
// For AdamW 28 bytes cross the memory bus for a fp32 value and its gradient (four reads, three
// writes) against some ten operations: one pass, nothing kept. A gradient that is not finite spoils
// its own value and moments, and no other, as it does in torch.
#pragma once

#include <cstdint>

#include "gradient_inl.h"
#include "qlora_native/backend.h"
#include "qlora_native/dispatch.h"
#include "tensor_spans.h"

namespace qlora::cpu {

template <class V, class P, class G, class Rule>
void step_span(const StepTensor<Rule::kMoments>& t, const Rule& rule, std::int64_t begin,
               std::int64_t end) {
  using F = typename V::F;
  P* const param = static_cast<P*>(t.param);
  const G* const grad = static_cast<const G*>(t.grad);

  const auto update = [&](std::int64_t i, const auto& load,
                          const auto& store) __attribute__((always_inline)) {
    F moments[Rule::kMoments];
    for (int j = 0; j < Rule::kMoments; ++j) moments[j] = load(t.moments[j] + i);
    const F p = rule.step(load(param + i), rule.gradient(load(grad + i)), moments);
    for (int j = 0; j < Rule::kMoments; ++j) store(t.moments[j] + i, moments[j]);
    store(param + i, p);
  };

  std::int64_t i = begin;
  for (; i + V::kWidth <= end; i += V::kWidth) {
    update(
        i, [](const auto* from) { return V::load(from); }, [](auto* to, F v) { V::store(to, v); });
  }
  if (i < end) {
    const std::int64_t rest = end - i;
    update(
        i, [rest](const auto* from) { return V::load_n(from, rest); },
        [rest](auto* to, F v) { V::store_n(to, v, rest); });
  }
}

// The op of a rule: Params is its StepParams.
template <class V, class Rule, class Params>
Status step(const Params& params, const Context& context) {
  if (is_skipped(params.hyper)) return {};
  const Rule rule(params.hyper);
  const auto span = [&](const typename Params::Tensor& t, std::int64_t begin, std::int64_t end) {
    with_type(t.param_dtype, [&]<class P>() {
      with_type(t.grad_dtype, [&]<class G>() { step_span<V, P, G>(t, rule, begin, end); });
    });
  };
  for_each_span(params.tensors, params.n_tensors, context, span);
  return {};
}

}  // namespace qlora::cpu
