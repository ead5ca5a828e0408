// An optimizer's step with 8-bit blockwise state (Dettmers et al., "8-bit Optimizers via Block-wise
// Quantization", 2022), by any rule, over many tensors in one call.
//
// A block of 256 values is decoded, updated in fp32 and encoded again without leaving the L1 cache.
// The parameter moves by the new moments as they are before encoding, as bitsandbytes has it; codes
// are the nearest ones (codes_8bit_inl.h) to a value times 1 / absmax, by the block's new absmax.
//
// Where a gradient, or its square, is not finite, the value keeps its parameter and its moments:
// otherwise the block's absmax would carry it into 255 neighbours. A rule's last moment tells,
// which takes in the gradient with the highest power.
#pragma once

#include <cstdint>

#include "codes_8bit_inl.h"
#include "gradient_inl.h"
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
template <class V>
struct MomentBlock {
  using F = typename V::F;
  static_assert(kOptimizerBlocksize % V::kWidth == 0 && kOptimizerBlocksize <= kRun8bit);

  alignas(64) float values[kOptimizerBlocksize];
  F largest = V::zero();  // magnitude, by lane

  // Over their absmax still. Lanes of the last vector past the end hold zero.
  template <bool kSigned>
  void decode(const std::uint8_t* codes, std::int64_t count) {
    decode_8bit<V, kSigned>(codes, count, values);
    for (std::int64_t i = count; i % V::kWidth != 0; ++i) values[i] = 0.0f;
  }

  [[gnu::always_inline]] void put(std::int64_t i, F value) {
    V::store(values + i, value);
    largest = V::max_magnitude(largest, value);
  }

  template <bool kSigned>
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

// body<j>() for each moment j.
template <int kMoments, int kIndex = 0, class Body>
[[gnu::always_inline]] inline void for_each_moment(const Body& body) {
  body.template operator()<kIndex>();
  if constexpr (kIndex + 1 < kMoments) for_each_moment<kMoments, kIndex + 1>(body);
}

template <class V, class P, class G, class Rule>
void step_8bit_block(const Step8bitTensor<Rule::kMoments>& t, const Rule& rule,
                     std::int64_t block) {
  using F = typename V::F;
  constexpr int kMoments = Rule::kMoments;
  const std::int64_t first = block * kOptimizerBlocksize;
  const std::int64_t rest = t.n - first;
  const std::int64_t count = rest < kOptimizerBlocksize ? rest : kOptimizerBlocksize;
  P* const param = static_cast<P*>(t.param) + first;
  const G* const grad = static_cast<const G*>(t.grad) + first;

  MomentBlock<V> moment_blocks[kMoments];
  F absmax[kMoments];
  for_each_moment<kMoments>([&]<int kIndex>() {
    absmax[kIndex] = V::set1(t.absmax[kIndex][block]);
    moment_blocks[kIndex].template decode<is_signed_moment(kIndex)>(t.codes[kIndex] + first, count);
  });
  const auto update = [&](std::int64_t i, F grad_value, F p) __attribute__((always_inline)) {
    F before[kMoments];
    F after[kMoments];
    for (int j = 0; j < kMoments; ++j) {
      before[j] = V::mul(V::load(moment_blocks[j].values + i), absmax[j]);
      after[j] = before[j];
    }
    const F moved = rule.step(p, rule.gradient(grad_value), after);
    const F test = after[kMoments - 1];
    for (int j = 0; j < kMoments; ++j) {
      moment_blocks[j].put(i, V::where_finite(test, after[j], before[j]));
    }
    return V::where_finite(test, moved, p);
  };

  std::int64_t i = 0;
  for (; i + V::kWidth <= count; i += V::kWidth) {
    V::store(param + i, update(i, V::load(grad + i), V::load(param + i)));
  }
  if (i < count) {
    const std::int64_t n = count - i;
    V::store_n(param + i, update(i, V::load_n(grad + i, n), V::load_n(param + i, n)), n);
  }
  for_each_moment<kMoments>([&]<int kIndex>() {
    moment_blocks[kIndex].template encode<is_signed_moment(kIndex)>(count, t.codes[kIndex] + first,
                                                                    &t.absmax[kIndex][block]);
  });
}

// The op of a rule: Params is its StepParams.
template <class V, class Rule, class Params>
Status step_8bit(const Params& params, const Context& context) {
  if (is_skipped(params.hyper)) return {};
  const Rule rule(params.hyper);
  const auto span = [&](const typename Params::Tensor& t, std::int64_t begin, std::int64_t end) {
    with_type(t.param_dtype, [&]<class P>() {
      with_type(t.grad_dtype, [&]<class G>() {
        for (std::int64_t i = begin; i < end; i += kOptimizerBlocksize) {
          step_8bit_block<V, P, G>(t, rule, i / kOptimizerBlocksize);
        }
      });
    });
  };
  for_each_span(params.tensors, params.n_tensors, context, span);
  return {};
}

}  // namespace qlora::cpu
