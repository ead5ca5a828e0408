// Twin of cuda/device/mma.cuh.
//
// Every product is exact in fp32; sums are rounded to fp32 one by one, k ascending, from the
// accumulator on. A tensor core adds several products at a time, of which it keeps a few bits more
// than fp32 or cuts some off, and rounds in a way of its own: results differ by some units in the
// last place of the largest summand, between cards too. Tests allow for it as for any order.
#pragma once

#include <array>
#include <cstdint>
#include <type_traits>

#include "counters.h"
#include "device/convert.cuh"
#include "device/fragments.cuh"
#include "device/thread.cuh"
#include "qlora_native/types.h"

namespace qlora::cuda {

inline constexpr bool kHasTensorCores16 = true;

namespace detail {

struct MmaOperands {
  Accumulator* d;
  const std::uint32_t* a;
  const std::uint32_t* b;
};

template <class T>
float half_of(std::uint32_t word, int half) {
  return to_float(T{static_cast<std::uint16_t>(word >> (16 * half))});
}

template <class Operands>
const Operands& of_lane(const std::array<void*, kWarpSize>& lanes, int lane) {
  return *static_cast<const Operands*>(lanes[static_cast<std::size_t>(lane)]);
}

// d += a b, and each lane's part of it back to the lane. What is in d is taken from the lanes.
template <class Operands, int kK>
void multiply_matrices(const std::array<void*, kWarpSize>& lanes, const float (&a)[16][kK],
                       const float (&b)[kK][8]) {
  float d[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const Accumulator& own = *of_lane<Operands>(lanes, lane).d;
    for (int i = 0; i < 4; ++i) d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = own.value[i];
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kK; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    Accumulator& own = *of_lane<Operands>(lanes, lane).d;
    for (int i = 0; i < 4; ++i) own.value[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

// Fragments to matrices, and the product. kK: 8 or 16.
template <class T, int kK>
void multiply(const std::array<void*, kWarpSize>& lanes) {
  emulation::counters().product(2 * 16 * 8 * kK);
  float a[16][kK];
  float b[kK][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& own = of_lane<MmaOperands>(lanes, lane);
    const int group = lane / 4;
    const int pair = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      for (int word = 0; word < kK / 4; ++word) {
        a[group + word % 2 * 8][pair + word / 2 * 8 + half] = half_of<T>(own.a[word], half);
      }
      for (int word = 0; word < kK / 8; ++word) {
        b[pair + word * 8 + half][group] = half_of<T>(own.b[word], half);
      }
    }
  }
  multiply_matrices<MmaOperands>(lanes, a, b);
}

struct MmaOperandsTf32 {
  Accumulator* d;
  const FragmentA8* a;
  const FragmentB8* b;
};

// The lower 13 bits of an operand are not looked at. Counted twice: tensor cores take tf32 at half
// the rate of 16-bit values.
inline void multiply_tf32(const std::array<void*, kWarpSize>& lanes) {
  emulation::counters().product(2 * (2 * 16 * 8 * 8));
  float a[16][8];
  float b[8][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& own = of_lane<MmaOperandsTf32>(lanes, lane);
    const int group = lane / 4;
    const int t = lane % 4;
    for (int i = 0; i < 4; ++i)
      a[group + i % 2 * 8][t + i / 2 * 4] = truncate_tf32(own.a->value[i]);
    for (int i = 0; i < 2; ++i) b[t + i * 4][group] = truncate_tf32(own.b->value[i]);
  }
  multiply_matrices<MmaOperandsTf32>(lanes, a, b);
}

}  // namespace detail

template <class T>
void mma_m16n8k8(Accumulator& d, std::uint32_t a0, std::uint32_t a1, std::uint32_t b0,
                 const Where& where = Where::current()) {
  static_assert(std::is_same_v<T, Float16> || std::is_same_v<T, BFloat16>);
  const std::uint32_t a[2] = {a0, a1};
  detail::MmaOperands operands{&d, a, &b0};
  machine().together("mma.m16n8k8", &operands, &detail::multiply<T, 8>, where);
}

template <class T>
void mma_m16n8k16(Accumulator& d, const FragmentA& a, const FragmentB& b,
                  const Where& where = Where::current()) {
  static_assert(std::is_same_v<T, Float16> || std::is_same_v<T, BFloat16>);
  detail::MmaOperands operands{&d, a.word, b.word};
  machine().together("mma.m16n8k16", &operands, &detail::multiply<T, 16>, where);
}

inline void mma_m16n8k8_tf32(Accumulator& d, const FragmentA8& a, const FragmentB8& b,
                             const Where& where = Where::current()) {
  detail::MmaOperandsTf32 operands{&d, &a, &b};
  machine().together("mma.m16n8k8.tf32", &operands, &detail::multiply_tf32, where);
}

}  // namespace qlora::cuda
