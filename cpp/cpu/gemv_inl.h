// The linear layer for one to kGemvMaxRows rows of x: the weight streams by once.
//
//   out[m][n] = bias[n] + sum over k of W[n][k] x[m][k] + scale * sum over r of B[n][r] u[m][r]
//
// Vectorized along k. A vector of 32-bit words is 8 * kWidth codes of one row; shifting it by 4 * j
// bits brings code j of every word to the bottom, where a look-up turns it into values. So lane i
// of step j meets x[8 i + j], and x is put into that order once per call: no code is ever moved
// across lanes. The eight products of a word are summed before they meet the scale, which is one
// for at least two words. Per vector of weights that is a shift, a look-up and one multiply-add for
// each row of x; with one row the shuffle unit limits it, with four the multiply-add units.
//
// Weights whose rows are not whole vectors of codes go through a decoded row.
#pragma once

#include <cstdint>

#include "decode_inl.h"
#include "dropout_inl.h"
#include "dtype_dispatch.h"
#include "gemm_panels_4bit_inl.h"
#include "parallel.h"
#include "qlora_native/layout.h"
#include "qlora_native/params.h"
#include "workspace.h"

namespace qlora::cpu {

// Above it packing panels pays.
inline constexpr std::int64_t kGemvMaxRows = 4;

struct GemvLora {
  const Lora* lora = nullptr;  // null: no branch
  float* u = nullptr;          // [M, R] out
};

// The scratch of one call, in floats. Rows of x are kept apart by whole vectors, padded with zeros.
template <class V>
struct GemvLayout {
  static constexpr std::int64_t kChunk = kCodesPerWord * V::kWidth;  // values in a vector of words

  explicit GemvLayout(const LinearParams& p, const GemvLora& branch)
      : k_padded(ceil_div(p.weight.cols, kChunk) * kChunk),
        r_padded(branch.lora == nullptr ? 0 : ceil_div(branch.lora->r, V::kWidth) * V::kWidth),
        // Scales of a row and what pick() reads past them; or a row of decoded values.
        per_thread(k_padded + V::kWidth),
        x_size(p.m * k_padded),
        u_size(p.m * r_padded) {}

  [[nodiscard]] std::int64_t floats(int threads) const {
    return 2 * x_size + u_size + threads * per_thread;
  }

  std::int64_t k_padded, r_padded, per_thread, x_size, u_size;
};

// sum[m] += row . x[m] for a row of `count` dense values and rows of x `x_stride` apart.
template <class V, int kM, class T>
void dot_dense(const T* row, std::int64_t count, const float* x, std::int64_t x_stride,
               typename V::F (&sum)[kM]) {
  for (std::int64_t i = 0; i < count; i += V::kWidth) {
    const auto v = V::load_n(row + i, count - i < V::kWidth ? count - i : V::kWidth);
    for (int m = 0; m < kM; ++m) sum[m] = V::fma(v, V::load(x + m * x_stride + i), sum[m]);
  }
}

// sum[m] += row `n` of the weight . x[m], with x as permute_x leaves it.
template <class V, int kM>
void dot_4bit(const Weight4bit& weight, std::int64_t n, const float* x, float* scales,
              typename V::F (&sum)[kM]) {
  using F = typename V::F;
  using I = typename V::I;
  constexpr std::int64_t kChunk = GemvLayout<V>::kChunk;
  const std::int64_t k = weight.cols, run = scale_run(weight);
  for (std::int64_t i = 0; i < k / run; ++i) {
    scales[i] = block_scale<V>(weight.scales, (n * k + i * run) / weight.blocksize);
  }
  for (int i = 0; i < V::kWidth; ++i) scales[k / run + i] = 0.0f;
  std::int32_t lane_scale[V::kWidth];
  for (int i = 0; i < V::kWidth; ++i) {
    lane_scale[i] = static_cast<std::int32_t>(i * kCodesPerWord / run);
  }
  const I scale_of_lane = V::load_int(lane_scale);
  const auto table = V::table(weight.format.values);
  const std::uint8_t* codes = weight.packed + n * k / 2;

  const auto chunk = [&](I words, std::int64_t first) {
    const F scale = V::pick(scales + first / run, scale_of_lane);
    const float* at = x + first * kM;
    F part[kM];
    const auto step = [&]<int kStep, int kShift>() {
      const F w = V::lookup(table, V::template shift_right<kShift>(words));
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) {
        const F right = V::load(at + m * kChunk + kStep * V::kWidth);
        part[m] = kStep == 0 ? V::mul(w, right) : V::fma(w, right, part[m]);
      }
    };
    step.template operator()<0, 4>();
    step.template operator()<1, 0>();
    step.template operator()<2, 12>();
    step.template operator()<3, 8>();
    step.template operator()<4, 20>();
    step.template operator()<5, 16>();
    step.template operator()<6, 28>();
    step.template operator()<7, 24>();
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) sum[m] = V::fma(part[m], scale, sum[m]);
  };
  std::int64_t first = 0;
  for (; first + kChunk <= k; first += kChunk) chunk(V::load_int(codes + first / 2), first);
  if (first < k) chunk(V::load_int_n(codes + first / 2, (k - first) / kCodesPerWord), first);
}

// A call with its number of rows known.
template <class V, int kM>
class GemvRun {
 public:
  GemvRun(const LinearParams& p, const GemvLora& branch, float* scratch)
      : p_(p),
        branch_(branch),
        layout_(p, branch),
        whole_(rows_are_whole_vectors(p.weight)),
        x_(scratch),
        x_dropped_(x_ + layout_.x_size),
        u_scaled_(x_dropped_ + layout_.x_size),
        per_thread_(u_scaled_ + layout_.u_size) {}

  void run(const Context& context) {
    dispatch_dtype(p_.dtype, [&]<class T>() { this->template read_x<T>(); });
    if (branch_.lora != nullptr) compute_u(context);
    const std::int64_t n = p_.weight.rows;
    const std::int64_t parts = n < context.threads ? n : context.threads;
    parallel_parts(context, parts, [&](std::int64_t part) {
      float* own = per_thread_ + part * layout_.per_thread;
      for (std::int64_t row = n * part / parts; row < n * (part + 1) / parts; ++row) {
        compute_row(row, own);
      }
    });
  }

 private:
  static constexpr std::int64_t kChunk = GemvLayout<V>::kChunk;

  // Where x[m][k] lies: [chunk][m][step][lane] for whole rows of codes, else row-major.
  std::int64_t place(std::int64_t m, std::int64_t k) const {
    if (!whole_) return m * layout_.k_padded + k;
    const std::int64_t chunk = k / kChunk, lane = k % kChunk / kCodesPerWord;
    return (chunk * kM + m) * kChunk + k % kCodesPerWord * V::kWidth + lane;
  }

  template <class T>
  void read_x() {
    const std::int64_t k = p_.weight.cols;
    const Dropout dropout = branch_.lora == nullptr ? Dropout{} : make_dropout<V>(*branch_.lora);
    const auto gain = V::set1(dropout.gain);
    for (std::int64_t m = 0; m < kM; ++m) {
      const T* from = static_cast<const T*>(p_.x) + m * k;
      for (std::int64_t i = 0; i < layout_.k_padded; ++i) {
        x_[place(m, i)] = i < k ? to_float(from[i]) : 0.0f;
      }
      if (branch_.lora == nullptr) continue;
      const DropoutRow<V> mask(dropout, m);
      for (std::int64_t i = 0; i < layout_.k_padded; i += V::kWidth) {
        const std::int64_t rest = k - i < 0 ? 0 : k - i;
        auto v = V::mul(V::load_n(from + i, rest < V::kWidth ? rest : V::kWidth), gain);
        if (dropout.active) v = mask.apply(v, i);
        V::store(x_dropped_ + m * layout_.k_padded + i, v);
      }
    }
  }

  void compute_u(const Context& context) {
    const Lora& lora = *branch_.lora;
    const std::int64_t k = p_.weight.cols;
    for (std::int64_t i = 0; i < layout_.u_size; ++i) u_scaled_[i] = 0.0f;
    dispatch_dtype(lora.dtype, [&]<class T>() {
      parallel_for(context, lora.r, 4, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t r = begin; r < end; ++r) {
          typename V::F sum[kM];
          for (auto& s : sum) s = V::zero();
          dot_dense<V, kM>(static_cast<const T*>(lora.a) + r * k, k, x_dropped_, layout_.k_padded,
                           sum);
          for (int m = 0; m < kM; ++m) {
            const float u = V::reduce_add(sum[m]);
            branch_.u[m * lora.r + r] = u;
            u_scaled_[m * layout_.r_padded + r] = lora.scale * u;
          }
        }
      });
    });
  }

  void compute_row(std::int64_t n, float* own) {
    const Weight4bit& weight = p_.weight;
    typename V::F sum[kM];
    for (auto& s : sum) s = V::zero();
    if (whole_) {
      dot_4bit<V, kM>(weight, n, x_, own, sum);
    } else {
      decode_run<V>(weight, n * weight.cols, weight.cols, own);
      dot_dense<V, kM>(own, weight.cols, x_, layout_.k_padded, sum);
    }
    if (branch_.lora != nullptr) {
      const std::int64_t r = branch_.lora->r;
      dispatch_dtype(branch_.lora->dtype, [&]<class T>() {
        dot_dense<V, kM>(static_cast<const T*>(branch_.lora->b) + n * r, r, u_scaled_,
                         layout_.r_padded, sum);
      });
    }
    dispatch_dtype(p_.dtype, [&]<class T>() {
      const float bias = p_.bias == nullptr ? 0.0f : to_float(static_cast<const T*>(p_.bias)[n]);
      for (int m = 0; m < kM; ++m) {
        static_cast<T*>(p_.out)[m * weight.rows + n] = from_float<T>(V::reduce_add(sum[m]) + bias);
      }
    });
  }

  const LinearParams& p_;
  const GemvLora& branch_;
  const GemvLayout<V> layout_;
  const bool whole_;
  float* x_;
  float* x_dropped_;  // [M][k_padded], the LoRA branch's
  float* u_scaled_;   // [M][r_padded]
  float* per_thread_;
};

template <class V>
Status gemv(const LinearParams& p, const GemvLora& branch, const Context& context) {
  if (p.m == 0) return {};
  const GemvLayout<V> layout(p, branch);
  const Workspace workspace(static_cast<std::size_t>(layout.floats(context.threads)) *
                            sizeof(float));
  auto* scratch = workspace.as<float>();
  if (scratch == nullptr) return kOutOfMemory;
  switch (p.m) {
    case 1:
      GemvRun<V, 1>(p, branch, scratch).run(context);
      break;
    case 2:
      GemvRun<V, 2>(p, branch, scratch).run(context);
      break;
    case 3:
      GemvRun<V, 3>(p, branch, scratch).run(context);
      break;
    default:
      GemvRun<V, 4>(p, branch, scratch).run(context);
      break;
  }
  return {};
}

}  // namespace qlora::cpu
