// The tensor cores' product of small matrices, by a whole warp (PTX: mma.sync), on the fragments of
// fragments.cuh. Products are exact; in which order a tensor core adds them, and how it rounds in
// between, is not documented.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device/fragments.cuh"
#include "qlora_native/types.h"

namespace qlora::cuda {

// Whether the code being compiled is for a GPU whose tensor cores take 16-bit values of both types,
// 16 deep, and tf32: sm_80 and later. A kernel that is not meant for others leaves its body out
// there.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
inline constexpr bool kHasTensorCores16 = false;
#else
inline constexpr bool kHasTensorCores16 = true;
#endif

// mma.sync.aligned.m16n8k8.row.col.f32.{f16.f16,bf16.bf16}.f32: words 0 and 1 of A, word 0 of B.
// BFloat16 from sm_80 on.
template <class T>
__device__ void mma_m16n8k8(Accumulator& d, std::uint32_t a0, std::uint32_t a1, std::uint32_t b0) {
  if constexpr (std::is_same_v<T, Float16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d.value[0]), "+f"(d.value[1]), "+f"(d.value[2]), "+f"(d.value[3])
        : "r"(a0), "r"(a1), "r"(b0));
  } else {
    static_assert(std::is_same_v<T, BFloat16>);
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d.value[0]), "+f"(d.value[1]), "+f"(d.value[2]), "+f"(d.value[3])
        : "r"(a0), "r"(a1), "r"(b0));
#else
    __trap();
#endif
  }
}

// mma.sync.aligned.m16n8k16.row.col.f32.{f16.f16,bf16.bf16}.f32; on sm_75 two of m16n8k8.
template <class T>
__device__ void mma_m16n8k16(Accumulator& d, const FragmentA& a, const FragmentB& b) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, Float16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d.value[0]), "+f"(d.value[1]), "+f"(d.value[2]), "+f"(d.value[3])
        : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b.word[0]),
          "r"(b.word[1]));
  } else {
    static_assert(std::is_same_v<T, BFloat16>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d.value[0]), "+f"(d.value[1]), "+f"(d.value[2]), "+f"(d.value[3])
        : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b.word[0]),
          "r"(b.word[1]));
  }
#else
  mma_m16n8k8<T>(d, a.word[0], a.word[1], b.word[0]);
  mma_m16n8k8<T>(d, a.word[2], a.word[3], b.word[1]);
#endif
}

// mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32: operands are floats that are tf32
// numbers (convert.cuh).
// From sm_80 on.
__device__ inline void mma_m16n8k8_tf32(Accumulator& d, const FragmentA8& a, const FragmentB8& b) {
#if __CUDA_ARCH__ >= 800
  const auto bits = [](float value) { return __float_as_uint(value); };
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d.value[0]), "+f"(d.value[1]), "+f"(d.value[2]), "+f"(d.value[3])
      : "r"(bits(a.value[0])), "r"(bits(a.value[1])), "r"(bits(a.value[2])), "r"(bits(a.value[3])),
        "r"(bits(b.value[0])), "r"(bits(b.value[1])));
#else
  __trap();
#endif
}

}  // namespace qlora::cuda
