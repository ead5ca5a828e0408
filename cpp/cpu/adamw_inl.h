// AdamW with 32-bit state, over many tensors in one call.
//
// 28 bytes cross the memory bus for a fp32 value and its gradient (four reads, three writes)
// against some ten operations: one pass, nothing kept. A gradient that is not finite spoils its own
// value and moments, and no other, as it does in torch.
#pragma once

#include <cstdint>

#include "adamw_update_inl.h"
#include "qlora_native/backend.h"
#include "qlora_native/dispatch.h"
#include "tensor_spans.h"

namespace qlora::cpu {

template <class V, class P, class G>
void adamw_span(const AdamwTensor& t, const AdamwUpdate<V>& update, std::int64_t begin,
                std::int64_t end) {
  using F = typename V::F;
  P* const param = static_cast<P*>(t.param);
  const G* const grad = static_cast<const G*>(t.grad);

  std::int64_t i = begin;
  for (; i + V::kWidth <= end; i += V::kWidth) {
    const F g = update.gradient(V::load(grad + i));
    const F m = update.first_moment(V::load(t.exp_avg + i), g);
    const F v = update.second_moment(V::load(t.exp_avg_sq + i), g);
    V::store(t.exp_avg + i, m);
    V::store(t.exp_avg_sq + i, v);
    V::store(param + i, update.param(V::load(param + i), m, v));
  }
  if (i < end) {
    const std::int64_t rest = end - i;
    const F g = update.gradient(V::load_n(grad + i, rest));
    const F m = update.first_moment(V::load_n(t.exp_avg + i, rest), g);
    const F v = update.second_moment(V::load_n(t.exp_avg_sq + i, rest), g);
    V::store_n(t.exp_avg + i, m, rest);
    V::store_n(t.exp_avg_sq + i, v, rest);
    V::store_n(param + i, update.param(V::load_n(param + i, rest), m, v), rest);
  }
}

template <class V>
Status adamw_step(const AdamwStepParams& params, const Context& context) {
  if (is_skipped(params.hyper)) return {};
  const AdamwUpdate<V> update(params.hyper);
  const auto span = [&](const AdamwTensor& t, std::int64_t begin, std::int64_t end) {
    with_type(t.param_dtype, [&]<class P>() {
      with_type(t.grad_dtype, [&]<class G>() { adamw_span<V, P, G>(t, update, begin, end); });
    });
  };
  for_each_span(params.tensors, params.n_tensors, context, span);
  return {};
}

}  // namespace qlora::cpu
