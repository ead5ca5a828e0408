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
#include "parallel.h"
#include "qlora_native/layout.h"
#include "qlora_native/params.h"
#include "whole_rows_inl.h"
#include "workspace.h"

namespace qlora::cpu {

// Above it packing panels pays: at M = 4 this takes 0.65 of the multiply-add rate (Zen 4, AVX-512,
// 4096 x 4096, 2026-11-24), and with more rows the sums of two rows of W no longer fit the
// registers.
inline constexpr std::int64_t kGemvMaxRows = 4;
inline constexpr std::int64_t kMaxRowsOfW = 4;

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
        row_floats(k_padded + 2 * V::kWidth),
        x_size(p.m * k_padded),
        u_size(p.m * r_padded) {}

  [[nodiscard]] std::int64_t floats(int threads) const {
    return 2 * x_size + u_size + threads * kMaxRowsOfW * row_floats;
  }

  std::int64_t k_padded, r_padded;
  std::int64_t row_floats;  // a row's scales and what pick() reads past them, or its decoded values
  std::int64_t x_size, u_size;
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

// One step: code kShift / 4 of every word, with the values of x that belong to it.
template <class V, int kStep, int kShift, int kM, int kN>
[[gnu::always_inline]] inline void dot_step(const typename V::Table& table,
                                            const typename V::I (&words)[kN], const float* x,
                                            typename V::F (&part)[kN][kM]) {
  typename V::F w[kN];
#pragma GCC unroll 4
  for (int i = 0; i < kN; ++i) w[i] = V::template lookup_at<kShift>(table, words[i]);
#pragma GCC unroll 4
  for (int m = 0; m < kM; ++m) {
    const auto right = V::load(x + m * GemvLayout<V>::kChunk + kStep * V::kWidth);
#pragma GCC unroll 4
    for (int i = 0; i < kN; ++i) {
      part[i][m] = kStep == 0 ? V::mul(w[i], right) : V::fma(w[i], right, part[i][m]);
    }
  }
}

// A vector of words of each of kN rows of W: eight steps, then the scales.
template <class V, int kM, int kN>
[[gnu::always_inline]] inline void dot_words(const typename V::Table& table,
                                             const typename V::I (&words)[kN], const float* x,
                                             const float* scales, std::int64_t scales_stride,
                                             typename V::I run_of_lane,
                                             typename V::F (&sum)[kN][kM]) {
  typename V::F part[kN][kM];
  dot_step<V, 0, 4>(table, words, x, part);
  dot_step<V, 1, 0>(table, words, x, part);
  dot_step<V, 2, 12>(table, words, x, part);
  dot_step<V, 3, 8>(table, words, x, part);
  dot_step<V, 4, 20>(table, words, x, part);
  dot_step<V, 5, 16>(table, words, x, part);
  dot_step<V, 6, 28>(table, words, x, part);
  dot_step<V, 7, 24>(table, words, x, part);
#pragma GCC unroll 4
  for (int i = 0; i < kN; ++i) {
    const auto scale = V::pick(scales + i * scales_stride, run_of_lane);
#pragma GCC unroll 4
    for (int m = 0; m < kM; ++m) sum[i][m] = V::fma(part[i][m], scale, sum[i][m]);
  }
}

// sum[i][m] = row n + i of the weight . x[m], with x in the order of GemvRun::place. The rows'
// scales go to `scales`, `scales_stride` apart.
template <class V, int kM, int kN>
[[gnu::always_inline]] inline void dot_4bit(const WholeRows<V>& rows, std::int64_t n,
                                            const float* x, float* scales,
                                            std::int64_t scales_stride,
                                            typename V::F (&sum)[kN][kM]) {
  using I = typename V::I;
  constexpr std::int64_t kChunk = GemvLayout<V>::kChunk;
  const std::int64_t k = rows.weight.cols;
  const int run_shift = rows.run_shift;
  const std::uint8_t* codes[kN];
  for (int i = 0; i < kN; ++i) {
    float* row_scales = scales + i * scales_stride;
    rows.scales(n + i, 0, k, row_scales);
    V::store(row_scales + (k >> run_shift), V::zero());
    codes[i] = rows.codes(n + i, 0);
    for (auto& s : sum[i]) s = V::zero();
  }
  const I run_of_lane = V::load_int(rows.run_of_word);
  const auto table = rows.table;
  const std::int64_t ahead = kN * (k >> 1);  // the same place of the rows that come next
  I words[kN];
  std::int64_t first = 0;
  for (; first + kChunk <= k; first += kChunk) {
#pragma GCC unroll 4
    for (int i = 0; i < kN; ++i) {
      words[i] = V::load_int(codes[i] + (first >> 1));
      V::prefetch(codes[i] + (first >> 1) + ahead);
    }
    dot_words<V>(table, words, x + first * kM, scales + (first >> run_shift), scales_stride,
                 run_of_lane, sum);
  }
  if (first < k) {
    for (int i = 0; i < kN; ++i) {
      words[i] = V::load_int_n(codes[i] + (first >> 1), (k - first) / kCodesPerWord);
    }
    dot_words<V>(table, words, x + first * kM, scales + (first >> run_shift), scales_stride,
                 run_of_lane, sum);
  }
}

// How many rows of W go by together: each value of x that is loaded serves them all. As many as the
// registers hold: kN * kM sums twice over (a word's and the row's), kN words, kN values.
template <int kWidth, int kM>
inline constexpr int kGemvRowsOfW = 1;
template <>
inline constexpr int kGemvRowsOfW<16, 1> = 2;
template <>
inline constexpr int kGemvRowsOfW<16, 2> = 4;
template <>
inline constexpr int kGemvRowsOfW<16, 3> = 3;
template <>
inline constexpr int kGemvRowsOfW<16, 4> = 3;
template <>
inline constexpr int kGemvRowsOfW<8, 1> = 2;

// A call with its number of rows known.
template <class V, int kM>
class GemvRun {
 public:
  GemvRun(const LinearParams& p, const GemvLora& branch, float* scratch)
      : p_(p),
        branch_(branch),
        layout_(p, branch),
        rows_(p.weight),
        whole_(WholeRows<V>::fits(p.weight)),
        x_(scratch),
        x_dropped_(x_ + layout_.x_size),
        u_scaled_(x_dropped_ + layout_.x_size),
        per_thread_(u_scaled_ + layout_.u_size) {}

  void run(const Context& context) {
    dispatch_dtype(p_.dtype, [&]<class T>() { this->template read_x<T>(); });
    if (branch_.lora != nullptr) compute_u(context);
    const std::int64_t n = p_.weight.rows;
    // Below some 2^17 products another thread costs more than it takes over.
    const std::int64_t worth = kM * n * p_.weight.cols / (std::int64_t{1} << 17) + 1;
    const std::int64_t parts = worth < context.threads ? worth : context.threads;
    parallel_parts(context, parts, [&](std::int64_t part) {
      float* own = per_thread_ + part * kMaxRowsOfW * layout_.row_floats;
      std::int64_t row = n * part / parts;
      const std::int64_t end = n * (part + 1) / parts;
      for (; row + kRowsOfW <= end; row += kRowsOfW) compute_rows<kRowsOfW>(row, own);
      for (; row < end; ++row) compute_rows<1>(row, own);
    });
  }

 private:
  static constexpr std::int64_t kChunk = GemvLayout<V>::kChunk;
  static constexpr int kRowsOfW = kGemvRowsOfW<V::kWidth, kM>;

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
    const std::int64_t least_ranks = (std::int64_t{1} << 16) / (k + 1) + 1;
    for (std::int64_t i = 0; i < layout_.u_size; ++i) u_scaled_[i] = 0.0f;
    dispatch_dtype(lora.dtype, [&]<class T>() {
      parallel_for(context, lora.r, least_ranks, [&](std::int64_t begin, std::int64_t end) {
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

  // Rows n.. of W, kN of them: a column of out each.
  template <int kN>
  void compute_rows(std::int64_t n, float* own) {
    typename V::F sum[kN][kM];
    if (whole_) {
      dot_4bit<V>(rows_, n, x_, own, layout_.row_floats, sum);
    } else {
      const std::int64_t k = p_.weight.cols;
      for (int i = 0; i < kN; ++i) {
        decode_run<V>(p_.weight, (n + i) * k, k, own);
        for (auto& s : sum[i]) s = V::zero();
        dot_dense<V, kM>(own, k, x_, layout_.k_padded, sum[i]);
      }
    }
    for (int i = 0; i < kN; ++i) finish_row(n + i, sum[i]);
  }

  void finish_row(std::int64_t n, typename V::F (&sum)[kM]) {
    if (branch_.lora != nullptr) {
      const std::int64_t r = branch_.lora->r;
      dispatch_dtype(branch_.lora->dtype, [&]<class T>() {
        dot_dense<V, kM>(static_cast<const T*>(branch_.lora->b) + n * r, r, u_scaled_,
                         layout_.r_padded, sum);
      });
    }
    dispatch_dtype(p_.dtype, [&]<class T>() {
      const float bias = p_.bias == nullptr ? 0.0f : to_float(static_cast<const T*>(p_.bias)[n]);
      T* out = static_cast<T*>(p_.out) + n;
      for (int m = 0; m < kM; ++m) {
        out[m * p_.weight.rows] = from_float<T>(V::reduce_add(sum[m]) + bias);
      }
    });
  }

  const LinearParams& p_;
  const GemvLora& branch_;
  const GemvLayout<V> layout_;
  const WholeRows<V> rows_;  // where whole_
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
