// One plain struct per op: everything a backend is told. Shapes in brackets, row-major, contiguous.
//
//   M tokens   N out_features   K in_features   R LoRA rank
//
// Every pointer is owned by the caller and was checked at the edge (cpp/torch/checks.h): a backend
// relies on it. Any of M, N, K, R and n may be 0. Outputs never alias inputs unless it says so.
#pragma once

#include <cstdint>

#include "qlora_native/format.h"
#include "qlora_native/layout.h"
#include "qlora_native/types.h"

namespace qlora {

// ---- quantization
// ---------------------------------------------------------------------------------

struct Quantize4bitParams {
  Format format;
  std::int64_t n;          // values
  std::int64_t blocksize;  // values that share a scale; a power of two, 32..4096
  DType dtype;             // of x
  const void* x;           // [n]
  std::uint8_t* packed;    // [ceil(n/2)] out
  float* absmax;           // [ceil(n/blocksize)] out
};

// Scales of a 4-bit matrix: plain (absmax) or double-quantized (the other three), never both.
struct Scales {
  const float* absmax = nullptr;            // [n_blocks]
  const std::uint8_t* absmax_q8 = nullptr;  // [n_blocks], codes of the signed dynamic map
  const float* nested_absmax = nullptr;     // [ceil(n_blocks/256)]
  const float* nested_offset = nullptr;     // [1], mean of the absmax values

  [[nodiscard]] constexpr bool double_quantized() const { return absmax_q8 != nullptr; }
};

// A frozen weight [rows = N, cols = K] (layout.h).
struct Weight4bit {
  Format format;
  std::int64_t rows;
  std::int64_t cols;
  std::int64_t blocksize;
  const std::uint8_t* packed;  // [ceil(rows*cols/2)]
  Scales scales;
};

// Whether every `rows` rows of a weight begin a block, and a nested one where scales have those.
[[nodiscard]] constexpr bool begins_blocks(const Weight4bit& w, std::int64_t rows) {
  const std::int64_t unit = w.blocksize * (w.scales.double_quantized() ? kNestedBlocksize : 1);
  return rows * w.cols % unit == 0;
}

// The weight that `rows` rows from `begin` on are, in place; begins_blocks(w, begin) must hold.
[[nodiscard]] constexpr Weight4bit rows_of(Weight4bit w, std::int64_t begin, std::int64_t rows) {
  const std::int64_t first_block = begin * w.cols / w.blocksize;
  w.rows = rows;
  w.packed += packed_bytes(begin * w.cols);
  if (w.scales.double_quantized()) {
    w.scales.absmax_q8 += first_block;
    w.scales.nested_absmax += first_block / kNestedBlocksize;
  } else {
    w.scales.absmax += first_block;
  }
  return w;
}

struct Dequantize4bitParams {
  Weight4bit weight;
  DType dtype;  // of out
  void* out;    // [rows, cols] out
};

enum class CodeRounding : std::uint8_t {
  nearest,           // by fp32 midpoints, a tie to the even code: bitsandbytes on CUDA
  bitsandbytes_cpu,  // bitsandbytes' 65,536-entry table on a CPU, bit for bit
};

struct Quantize8bitParams {
  std::int64_t n;
  std::int64_t blocksize;
  bool is_signed;  // which dynamic map (dynamic_map.h)
  CodeRounding rounding;
  DType dtype;          // of x
  const void* x;        // [n]
  std::uint8_t* codes;  // [n] out
  float* absmax;        // [ceil(n/blocksize)] out
};

struct Dequantize8bitParams {
  std::int64_t n;
  std::int64_t blocksize;
  bool is_signed;
  const std::uint8_t* codes;  // [n]
  const float* absmax;        // [ceil(n/blocksize)]
  DType dtype;                // of out
  void* out;                  // [n] out
};

// Double quantization of absmax itself (QLoRA, section 3): offset = mean, blocks of 256, signed
// map.
struct QuantizeScalesParams {
  std::int64_t n;
  CodeRounding rounding;
  const float* absmax;            // [n]
  const float* offset = nullptr;  // [1] to subtract, or null: the mean
  std::uint8_t* absmax_q8;        // [n] out
  float* nested_absmax;           // [ceil(n/256)] out
  float* nested_offset;           // [1] out, what was subtracted

  // The same as 8-bit quantization, but for what is subtracted.
  [[nodiscard]] constexpr Quantize8bitParams as_8bit() const {
    return {.n = n,
            .blocksize = kNestedBlocksize,
            .is_signed = true,
            .rounding = rounding,
            .dtype = DType::float32,
            .x = absmax,
            .codes = absmax_q8,
            .absmax = nested_absmax};
  }
};

struct DequantizeScalesParams {
  std::int64_t n;
  Scales scales;  // double-quantized
  float* absmax;  // [n] out

  // The same as 8-bit dequantization, but for the offset, which is added.
  [[nodiscard]] constexpr Dequantize8bitParams as_8bit() const {
    return {.n = n,
            .blocksize = kNestedBlocksize,
            .is_signed = true,
            .codes = scales.absmax_q8,
            .absmax = scales.nested_absmax,
            .dtype = DType::float32,
            .out = absmax};
  }
};

// ---- linear
// ---------------------------------------------------------------------------------------

// y = x W^T + bias
struct LinearParams {
  std::int64_t m;
  Weight4bit weight;  // [N, K]
  DType dtype;        // of x, bias and out
  const void* x;      // [M, K]
  const void* bias;   // [N] or null
  void* out;          // [M, N] out
};

// grad_x = grad_out W
struct LinearBackwardInputParams {
  std::int64_t m;
  Weight4bit weight;     // [N, K]
  DType dtype;           // of grad_out and grad_x
  const void* grad_out;  // [M, N]
  void* grad_x;          // [M, K] out
};

struct Lora {
  std::int64_t r;
  DType dtype;                       // of a and b (and of their gradients)
  const void* a;                     // [R, K]
  const void* b;                     // [N, R]
  float scale;                       // alpha / r, or alpha / sqrt(r) for rsLoRA
  float dropout_p;                   // 0: none
  const std::int64_t* dropout_seed;  // [1]; null when dropout_p is 0
};

// y = x W^T + bias + scale * u B^T,  u = drop(x) A^T
struct QloraLinearParams {
  LinearParams base;
  Lora lora;
  float* u;  // [M, R] out, fp32: what the backward pass needs again
};

// With g = scale * grad_out B  [M, R]:
//   grad_x = grad_out W + drop'(g A)    grad_a = g^T drop(x)
//   grad_b = scale * grad_out^T u       grad_bias = sum over M of grad_out
// Each output is computed only where its pointer is not null.
struct QloraLinearBackwardParams {
  std::int64_t m;
  Weight4bit weight;
  Lora lora;
  DType dtype;           // of grad_out, x, grad_x, grad_bias
  const void* grad_out;  // [M, N]
  const void* x;         // [M, K]
  const float* u;        // [M, R]
  void* grad_x;          // [M, K] out
  void* grad_a;          // [R, K] out, lora.dtype
  void* grad_b;          // [N, R] out, lora.dtype
  void* grad_bias;       // [N] out
};

// ---- what a backend asks of its caller (Context::matmul)
// ---------------------------------------------------

// A matrix in memory: `data` is element [0, 0]; rows lie `row_stride` elements apart, an element
// beside the next, or, transposed, columns do.
struct MatrixIn {
  const void* data;
  std::int64_t row_stride;
  bool transposed = false;
};

// out = a b + bias, all of one type, accumulated in fp32.
struct MatmulParams {
  std::int64_t m;
  std::int64_t n;
  std::int64_t k;
  DType dtype;
  MatrixIn a;                  // [M, K]
  MatrixIn b;                  // [K, N]
  const void* bias = nullptr;  // [N] or null
  void* out;                   // [M, N], rows out_row_stride apart
  std::int64_t out_row_stride;
};

// ---- optimizer
// ------------------------------------------------------------------------------------

// A parameter, its gradient and the moments that a rule keeps of it.
template <int kCount>
struct StepTensor {
  static constexpr int kMoments = kCount;
  std::int64_t n;
  DType param_dtype;
  DType grad_dtype;
  void* param;               // [n] in, out
  const void* grad;          // [n]
  float* moments[kMoments];  // [n] each; in, out
};

// The same with 8-bit blockwise state (Dettmers et al., 2022): blocks of 256 values with one absmax
// each, codes of the signed map for the first moment and of the unsigned one for the second.
template <int kCount>
struct Step8bitTensor {
  static constexpr int kMoments = kCount;
  std::int64_t n;
  DType param_dtype;
  DType grad_dtype;
  void* param;                    // [n] in, out
  const void* grad;               // [n]
  std::uint8_t* codes[kMoments];  // [n] each; in, out
  float* absmax[kMoments];        // [ceil(n/256)] each; in, out
};

constexpr bool is_signed_moment(int moment) { return moment == 0; }

// Many tensors in one call.
template <class RuleHyper, class RuleTensor>
struct StepParams {
  using Hyper = RuleHyper;
  using Tensor = RuleTensor;
  Hyper hyper;
  std::int64_t n_tensors;
  const Tensor* tensors;  // [n_tensors]
};

// In every rule: gradients are divided by grad_scale ([1] or null) and negated to maximize; a
// found_inf ([1] or null) that is not 0 skips the whole step.

// AdamW (Loshchilov & Hutter, 2019) in torch.optim.AdamW's order of operations; moments exp_avg and
// exp_avg_sq.
struct AdamwHyper {
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  std::int64_t step;  // 1 in the first call
  bool maximize;
  const float* grad_scale;
  const float* found_inf;
};
using AdamwTensor = StepTensor<2>;
using AdamwStepParams = StepParams<AdamwHyper, AdamwTensor>;
using Adamw8bitTensor = Step8bitTensor<2>;
using Adamw8bitStepParams = StepParams<AdamwHyper, Adamw8bitTensor>;

// Lion (Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, algorithm 2); moment
// exp_avg.
struct LionHyper {
  double lr;
  double beta1;
  double beta2;
  double weight_decay;
  bool maximize;
  const float* grad_scale;
  const float* found_inf;
};
using LionStepParams = StepParams<LionHyper, StepTensor<1>>;
using Lion8bitStepParams = StepParams<LionHyper, Step8bitTensor<1>>;

// SGD with momentum in torch.optim.SGD's order of operations; moment momentum_buffer.
struct SgdHyper {
  double lr;
  double momentum;
  double dampening;
  double weight_decay;  // coupled: added to the gradient
  bool nesterov;
  bool first_step;  // the buffer begins as the gradient, un-dampened
  bool maximize;
  const float* grad_scale;
  const float* found_inf;
};
using SgdStepParams = StepParams<SgdHyper, StepTensor<1>>;
using Sgd8bitStepParams = StepParams<SgdHyper, Step8bitTensor<1>>;

}  // namespace qlora
