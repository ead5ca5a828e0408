// Tile and block sizes of the packed matrix product, as data.
//
// kRows x (kVecs vectors) accumulators stay in registers; a panel of the right-hand side is kVecs
// vectors wide. A block of kSteps depth steps (a step is one fp32, or a pair of bf16) by kCols
// columns of the right-hand side is packed at a time and should stay in the second-level cache;
// kRowChunk rows of C go with it. kSteps is a multiple of 8 * kWidth, the codes that one
// transposition takes.
#pragma once

#include <cstdint>

namespace qlora::cpu {

inline constexpr std::int64_t kCacheLine = 64;

[[gnu::always_inline]] constexpr std::int64_t least(std::int64_t a, std::int64_t b) {
  return a < b ? a : b;
}

// What all instruction sets share.
struct GemmBlocking {
  static constexpr int kVecs = 2;
  static constexpr std::int64_t kSteps = 384;
  static constexpr std::int64_t kRunSteps = 128;  // that one sum in registers takes
  // The same where C is one vector wide (u = x A^T), where MKL's sums are shorter, too.
  static constexpr std::int64_t kSlimRunSteps = 16;
  static constexpr std::int64_t kOperandStride = kSteps + 16;  // a power of two would alias in L1
  static constexpr std::int64_t kRowChunk = 512;
};

template <int kWidth>
struct GemmShape;

template <>
struct GemmShape<4> : GemmBlocking {  // scalar: 16 SSE or 32 NEON registers
  static constexpr int kRows = 4;
  static constexpr std::int64_t kRunSteps = 16;  // two roundings a step where there is no fma
  static constexpr std::int64_t kPanels = 32;
};

template <>
struct GemmShape<8> : GemmBlocking {  // AVX2: 12 of 16 registers accumulate, 2 hold the panel
  static constexpr int kRows = 6;
  static constexpr std::int64_t kPanels = 16;
};

template <>
struct GemmShape<16> : GemmBlocking {  // AVX-512: 28 of 32 registers accumulate, 2 hold the panel
  static constexpr int kRows = 14;
  static constexpr std::int64_t kPanels = 8;
};

template <class V>
struct Gemm : GemmShape<V::kWidth> {
  using Shape = GemmShape<V::kWidth>;
  static constexpr std::int64_t kPanelCols = std::int64_t{Shape::kVecs} * V::kWidth;
  static constexpr std::int64_t kCols = Shape::kPanels * kPanelCols;
  static constexpr std::int64_t kPanelSize = Shape::kSteps * kPanelCols;  // in fp32 or bf16 pairs
};

}  // namespace qlora::cpu
