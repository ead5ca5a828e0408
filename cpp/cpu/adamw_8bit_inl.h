// AdamW with 8-bit blockwise state (Dettmers et al., "8-bit Optimizers via Block-wise
// Quantization", 2022), over many tensors in one call.
//
// A block of 256 values is decoded, updated in fp32 and encoded again without leaving the L1 cache.
// The parameter moves by the new moments as they are before encoding, as bitsandbytes has it; codes
// are the nearest ones (codes_8bit_inl.h) to a value times 1 / absmax, by the block's new absmax.
//
// Where a gradient, or its square, is not finite, the value keeps its parameter and its moments:
// otherwise the block's absmax would carry it into 255 neighbours.
#pragma once

#include <cstdint>

#include "adamw_update_inl.h"
#include "codes_8bit_inl.h"
#include "qlora_native/backend.h"
#include "qlora_native/dispatch.h"
#include "qlora_native/layout.h"
#include "tensor_spans.h"

namespace qlora::cpu {

// Whether x * (1 / absmax) loses nothing to the subnormals: second moments do get so small.
constexpr bool has_normal_inverse(float absmax) {
  return absmax >= 0x1p-120f && absmax <= 0x1p120f;
}

// One moment of one block in fp32, between decoding and encoding.
template <class V, bool kSigned>
struct MomentBlock {
  using F = typename V::F;
  static_assert(kOptimizerBlocksize % V::kWidth == 0 && kOptimizerBlocksize <= kRun8bit);

  alignas(64) float values[kOptimizerBlocksize];
  F largest = V::zero();  // magnitude, by lane

  // Over their absmax still. Lanes of the last vector past the end hold zero.
  void decode(const std::uint8_t* codes, std::int64_t count) {
    decode_8bit<V, kSigned>(codes, count, values);
    for (std::int64_t i = count; i % V::kWidth != 0; ++i) values[i] = 0.0f;
  }

  [[gnu::always_inline]] void put(std::int64_t i, F value) {
    V::store(values + i, value);
    largest = V::max_magnitude(largest, value);
  }

  void encode(std::int64_t count, std::uint8_t* codes, float* absmax) const {
    *absmax = V::reduce_max_magnitude(largest);
    const bool finite = *absmax <= kLargestFloat;
    if (has_normal_inverse(*absmax)) {
      const F inverse = V::set1(1.0f / *absmax);
      const auto value = [&](std::int64_t i) { return V::mul(V::load(values + i), inverse); };
      encode_8bit<V, kSigned>(value, count, finite, codes);
    } else {  // a block of zeros has absmax 0 and the codes of zero
      const F divisor = V::set1(*absmax == 0.0f ? 1.0f : *absmax);
      const auto value = [&](std::int64_t i) { return V::div(V::load(values + i), divisor); };
      encode_8bit<V, kSigned>(value, count, finite, codes);
    }
  }
};

template <class V, class P, class G>
void adamw_8bit_block(const Adamw8bitTensor& t, const AdamwUpdate<V>& update, std::int64_t block) {
  using F = typename V::F;
  const std::int64_t first = block * kOptimizerBlocksize;
  const std::int64_t rest = t.n - first;
  const std::int64_t count = rest < kOptimizerBlocksize ? rest : kOptimizerBlocksize;
  P* const param = static_cast<P*>(t.param) + first;
  const G* const grad = static_cast<const G*>(t.grad) + first;
  const F m_absmax = V::set1(t.exp_avg_absmax[block]);
  const F v_absmax = V::set1(t.exp_avg_sq_absmax[block]);

  MomentBlock<V, true> m_block;
  MomentBlock<V, false> v_block;
  m_block.decode(t.exp_avg + first, count);
  v_block.decode(t.exp_avg_sq + first, count);
  const auto update_values = [&](std::int64_t i, F raw_grad, F p) __attribute__((always_inline)) {
    const F g = update.gradient(raw_grad);
    const F m_old = V::mul(V::load(m_block.values + i), m_absmax);
    const F v_old = V::mul(V::load(v_block.values + i), v_absmax);
    const F v_new = update.second_moment(v_old, g);
    const F m = V::where_finite(v_new, update.first_moment(m_old, g), m_old);
    const F v = V::where_finite(v_new, v_new, v_old);
    m_block.put(i, m);
    v_block.put(i, v);
    return V::where_finite(v_new, update.param(p, m, v), p);
  };

  std::int64_t i = 0;
  for (; i + V::kWidth <= count; i += V::kWidth) {
    V::store(param + i, update_values(i, V::load(grad + i), V::load(param + i)));
  }
  if (i < count) {
    const std::int64_t n = count - i;
    V::store_n(param + i, update_values(i, V::load_n(grad + i, n), V::load_n(param + i, n)), n);
  }
  m_block.encode(count, t.exp_avg + first, &t.exp_avg_absmax[block]);
  v_block.encode(count, t.exp_avg_sq + first, &t.exp_avg_sq_absmax[block]);
}

template <class V>
Status adamw_8bit_step(const Adamw8bitStepParams& params, const Context& context) {
  if (is_skipped(params.hyper)) return {};
  const AdamwUpdate<V> update(params.hyper);
  const auto span = [&](const Adamw8bitTensor& t, std::int64_t begin, std::int64_t end) {
    with_type(t.param_dtype, [&]<class P>() {
      with_type(t.grad_dtype, [&]<class G>() {
        for (std::int64_t i = begin; i < end; i += kOptimizerBlocksize) {
          adamw_8bit_block<V, P, G>(t, update, i / kOptimizerBlocksize);
        }
      });
    });
  };
  for_each_span(params.tensors, params.n_tensors, context, span);
  return {};
}

}  // namespace qlora::cpu
