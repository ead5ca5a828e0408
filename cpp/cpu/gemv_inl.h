// The linear layer for one to kGemvMaxRows rows of x: the weight streams by once.
//
//   out[m][n] = bias[n] + sum over k of W[n][k] x[m][k] + scale * sum over r of B[n][r] u[m][r]
//
// Vectorized along k, a vector of words (8 codes each) of a few rows of W at a time: no code is
// ever moved to another place of its row, but x is put once per call into the order in which codes
// come out of their words (gemv_words_inl.h).
//
// Weights whose rows are not whole runs of codes go through a decoded row.
#pragma once

#include <cstdint>
#include <cstring>

#include "decode_inl.h"
#include "dropout_inl.h"
#include "gemv_words_inl.h"
#include "parallel.h"
#include "qlora_native/dispatch.h"
#include "qlora_native/layout.h"
#include "qlora_native/params.h"
#include "row_scales_inl.h"
#include "whole_rows_inl.h"
#include "workspace.h"

namespace qlora::cpu {

// Above it packing panels pays. With 16 lanes a value of W that was decoded meets up to 8 rows of x
// in registers; with 8 lanes half as many sums fit.
template <class V>
inline constexpr std::int64_t kGemvMaxRows = V::kWidth == 16 ? 8 : 4;
inline constexpr int kMaxRowsOfW = 4;
inline constexpr std::int64_t kGemvSpan = 1024;  // values between two readings ahead of scales
inline constexpr std::int64_t kGemvBlock = 64;   // rows of W that a thread takes at a time

struct GemvLora {
  const Lora* lora = nullptr;  // null: no branch
  float* u = nullptr;          // [M, R] out
};

// The scratch of one call, in floats. Rows of x are kept apart by whole vectors of words, padded
// with zeros.
template <class V>
struct GemvLayout {
  explicit GemvLayout(const LinearParams& p, const GemvLora& branch)
      : k_padded(ceil_div(p.weight.cols, kCodesOfWords<V>) * kCodesOfWords<V>),
        r_padded(branch.lora == nullptr ? 0 : ceil_div(branch.lora->r, V::kWidth) * V::kWidth),
        own_floats(RowScales<V, kMaxRowsOfW>::floats(p.weight.cols) + k_padded),
        x_size(p.m * k_padded),
        u_size(p.m * r_padded) {}

  [[nodiscard]] std::int64_t floats(int threads) const {
    return 2 * x_size + u_size + threads * own_floats;
  }

  std::int64_t k_padded, r_padded;
  std::int64_t own_floats;  // a thread's: the scales of its rows, or one decoded row
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

// result[i][m] = row n + i of the weight . x[m], with x in the decoder's order. Reads ahead the
// scales of rows `next`.. . The sums are a variable of this function, or they would live in memory.
template <class Decoder, int kM, int kN, class V = typename Decoder::Vector>
[[gnu::always_inline]] inline void dot_rows(const Decoder& decoder, const WholeRows<V>& rows,
                                            std::int64_t n, std::int64_t next, const float* x,
                                            RowScales<V, kN>& scales,
                                            typename V::F (&result)[kN][kM]) {
  constexpr std::int64_t kWords = kCodesOfWords<V>;
  constexpr std::int64_t kX = Decoder::kSteps * V::kWidth;  // floats of x per vector of words
  const std::int64_t k = rows.weight.cols;
  const std::uint8_t* codes[kN];
  typename V::F sum[kN][kM];
  scales.advance(n);
#pragma GCC unroll 8
  for (int i = 0; i < kN; ++i) {
    codes[i] = rows.codes(n + i, 0);
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) sum[i][m] = V::zero();
  }
  const auto run_of_word = V::load_int(rows.run_of_word);
  const std::int64_t ahead = kN * (k >> 1);  // the same place of the rows that come next
  typename V::I words[kN];
  typename Decoder::Scale scale[kN];
  const std::int64_t whole = k / kWords * kWords;
  for (std::int64_t first = 0; first < whole;) {
    const std::int64_t end = whole - first < kGemvSpan ? whole : first + kGemvSpan;
    scales.read_ahead(next, first, end - first);
    for (; first < end; first += kWords) {
#pragma GCC unroll 8
      for (int i = 0; i < kN; ++i) {
        words[i] = V::load_int(codes[i] + (first >> 1));
        V::prefetch(codes[i] + (first >> 1) + ahead);
        scale[i] = decoder.scale(scales.of(i, first), rows.run_shift, run_of_word);
      }
      dot_words<Decoder, kM, kN>(decoder, words, x + first / kWords * kM * kX, scale, sum);
    }
  }
  if (whole < k) {
    scales.read_ahead(next, whole, k - whole);
#pragma GCC unroll 8
    for (int i = 0; i < kN; ++i) {
      words[i] = V::load_int_n(codes[i] + (whole >> 1), (k - whole) / kCodesPerWord);
      scale[i] = decoder.scale(scales.of(i, whole), rows.run_shift, run_of_word);
    }
    dot_words<Decoder, kM, kN>(decoder, words, x + whole / kWords * kM * kX, scale, sum);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kN; ++i) {
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) result[i][m] = sum[i][m];
  }
}

// Whether rows of the weight are whole runs of codes, as long as the decoder needs them.
template <class Decoder>
bool serves(const Weight4bit& weight) {
  using Rows = WholeRows<typename Decoder::Vector>;
  return Rows::fits(weight) && Rows(weight).run_shift >= Decoder::kMinRunShift;
}

// A call with its decoder and its number of rows known.
template <class Decoder, int kM>
class GemvRun {
 public:
  using V = typename Decoder::Vector;

  GemvRun(const LinearParams& p, const GemvLora& branch, float* scratch)
      : p_(p),
        branch_(branch),
        layout_(p, branch),
        decoder_(p.weight.format.values),
        rows_(p.weight),
        whole_(serves<Decoder>(p.weight)),
        x_(scratch),
        x_dropped_(x_ + layout_.x_size),
        u_scaled_(x_dropped_ + layout_.x_size),
        per_thread_(u_scaled_ + layout_.u_size) {}

  void run(const Context& context) {
    with_type(p_.dtype, [&]<class T>() { this->template read_x<T>(); });
    if (branch_.lora != nullptr) compute_u(context);
    const std::int64_t n = p_.weight.rows;
    // Below some 2^17 products another thread costs more than it takes over.
    const std::int64_t worth = kM * n * p_.weight.cols / (std::int64_t{1} << 17) + 1;
    const std::int64_t parts = worth < context.threads ? worth : context.threads;
    parallel_blocks(context, parts, ceil_div(n, kGemvBlock),
                    [&](std::int64_t part, std::int64_t block) {
                      const std::int64_t begin = block * kGemvBlock;
                      const std::int64_t end = begin + kGemvBlock < n ? begin + kGemvBlock : n;
                      compute_block(begin, end, per_thread_ + part * layout_.own_floats);
                    });
  }

 private:
  static constexpr std::int64_t kWords = kCodesOfWords<V>;
  using Shape = GemvShape<Decoder, kM>;

  template <class T>
  void read_x() {
    const std::int64_t k = p_.weight.cols;
    for (std::int64_t m = 0; m < kM; ++m) {
      const T* from = static_cast<const T*>(p_.x) + m * k;
      for (std::int64_t first = 0; first < layout_.k_padded; first += kWords) {
        float values[kWords];
        for (std::int64_t i = 0; i < kWords; i += V::kWidth) {
          V::store(values + i, load_x(from, first + i));
        }
        if (whole_) {
          constexpr std::int64_t kX = Decoder::kSteps * V::kWidth;
          Decoder::place_x(values, x_ + (first / kWords * kM + m) * kX);
        } else {
          std::memcpy(x_ + m * layout_.k_padded + first, values, sizeof values);
        }
      }
      if (branch_.lora != nullptr) drop_x(from, m);
    }
  }

  // A vector of a row of x from value i on, zeros past its end.
  template <class T>
  typename V::F load_x(const T* row, std::int64_t i) const {
    const std::int64_t rest = p_.weight.cols - i;
    if (rest >= V::kWidth) return V::load(row + i);
    return rest > 0 ? V::load_n(row + i, rest) : V::zero();
  }

  template <class T>
  void drop_x(const T* from, std::int64_t m) {
    const Dropout dropout = make_dropout<V>(*branch_.lora);
    const auto gain = V::set1(dropout.gain);
    const DropoutRow<V> mask(dropout, m);
    for (std::int64_t i = 0; i < layout_.k_padded; i += V::kWidth) {
      auto v = V::mul(load_x(from, i), gain);
      if (dropout.active) v = mask.apply(v, i);
      V::store(x_dropped_ + m * layout_.k_padded + i, v);
    }
  }

  void compute_u(const Context& context) {
    const Lora& lora = *branch_.lora;
    const std::int64_t k = p_.weight.cols;
    const std::int64_t least_ranks = (std::int64_t{1} << 16) / (k + 1) + 1;
    for (std::int64_t i = 0; i < layout_.u_size; ++i) u_scaled_[i] = 0.0f;
    with_type(lora.dtype, [&]<class T>() {
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

  void compute_block(std::int64_t begin, std::int64_t end, float* own) {
    if (!whole_) {
      for (std::int64_t n = begin; n < end; ++n) compute_decoded_row(n, own);
      return;
    }
    if (p_.weight.cols >= Shape::kLong) {
      compute_groups<Shape::kLongN>(begin, end, own);
    } else {
      compute_groups<Shape::kN>(begin, end, own);
    }
  }

  template <int kGroup>
  void compute_groups(std::int64_t begin, std::int64_t end, float* own) {
    const std::int64_t whole_end = begin + (end - begin) / kGroup * kGroup;
    compute_rows<kGroup>(begin, whole_end, own);
    if constexpr (kGroup > 1) compute_rows<1>(whole_end, end, own);
  }

  // Rows begin..end - 1 of W, kGroup of them at a time: a column of out each.
  template <int kGroup>
  void compute_rows(std::int64_t begin, std::int64_t end, float* own) {
    if (begin == end) return;
    RowScales<V, kGroup> scales(rows_, begin, own);
    for (std::int64_t n = begin; n < end; n += kGroup) {
      const std::int64_t next = n + kGroup < end ? n + kGroup : n;
      typename V::F sum[kGroup][kM];
      dot_rows<Decoder, kM, kGroup>(decoder_, rows_, n, next, x_, scales, sum);
      for (int i = 0; i < kGroup; ++i) finish_row(n + i, sum[i]);
    }
  }

  void compute_decoded_row(std::int64_t n, float* own) {
    const std::int64_t k = p_.weight.cols;
    typename V::F sum[kM];
    for (auto& s : sum) s = V::zero();
    decode_run<V>(p_.weight, n * k, k, own);
    dot_dense<V, kM>(own, k, x_, layout_.k_padded, sum);
    finish_row(n, sum);
  }

  void finish_row(std::int64_t n, typename V::F (&sum)[kM]) {
    if (branch_.lora != nullptr) {
      const std::int64_t r = branch_.lora->r;
      with_type(branch_.lora->dtype, [&]<class T>() {
        dot_dense<V, kM>(static_cast<const T*>(branch_.lora->b) + n * r, r, u_scaled_,
                         layout_.r_padded, sum);
      });
    }
    with_type(p_.dtype, [&]<class T>() {
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
  const Decoder decoder_;
  const WholeRows<V> rows_;  // where whole_
  const bool whole_;
  float* x_;
  float* x_dropped_;  // [M][k_padded], the LoRA branch's
  float* u_scaled_;   // [M][r_padded]
  float* per_thread_;
};

// From the number of rows at run time to the run for it.
template <class Decoder, int kM = kGemvMaxRows<typename Decoder::Vector>>
void gemv_rows(const LinearParams& p, const GemvLora& branch, float* scratch,
               const Context& context) {
  if constexpr (kM > 1) {
    if (p.m < kM) return gemv_rows<Decoder, kM - 1>(p, branch, scratch, context);
  }
  GemvRun<Decoder, kM>(p, branch, scratch).run(context);
}

template <class V>
Status gemv(const LinearParams& p, const GemvLora& branch, const Context& context) {
  if (p.m == 0) return {};
  const GemvLayout<V> layout(p, branch);
  const Workspace workspace(static_cast<std::size_t>(layout.floats(context.threads)) *
                            sizeof(float));
  auto* scratch = workspace.as<float>();
  if (scratch == nullptr) return kOutOfMemory;
  if constexpr (HasPairTables<V>) {
    if (p.dtype == DType::bfloat16 && serves<PairWords<V>>(p.weight)) {
      gemv_rows<PairWords<V>>(p, branch, scratch, context);
      return {};
    }
  }
  if constexpr (HasBytePlanes<V>) {
    gemv_rows<PlaneWords<V>>(p, branch, scratch, context);
  } else {
    gemv_rows<ShiftWords<V>>(p, branch, scratch, context);
  }
  return {};
}

}  // namespace qlora::cpu
