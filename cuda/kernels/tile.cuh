// How the elementwise kernels share values out: a block of threads takes tiles of 4096 values, a
// thread 8 consecutive ones ("an octet").
//
// 4096 is the largest blocksize, so a tile holds whole blocks of any size. Eight values are 16
// bytes of a 16-bit type, 32 of fp32 (two accesses) and 4 bytes of codes: a warp moves 512, 1024
// and 128 contiguous bytes, whole sectors each. Where a tensor does not start at such a boundary (a
// view), and in a warp where it ends, values are moved one by one.
//
// Occupancy hides the latency, not loops: 1024 to 2048 threads with 16 or more bytes each in flight
// are 16 to 64 kB on a multiprocessor, which needs some 15 kB on an H100 (3.35 TB/s, 600 ns).
#pragma once

#include <bit>
#include <cstdint>

#include "device/convert.cuh"
#include "device/global.cuh"
#include "device/thread.cuh"
#include "device/warp.cuh"
#include "qlora_native/layout.h"

namespace qlora::cuda {

inline constexpr int kOctet = 8;
inline constexpr int kTileValues = 4096;
inline constexpr int kTileThreads = kTileValues / kOctet;
inline constexpr int kTileWarps = kTileThreads / kWarpSize;
static_assert(kTileValues >= kMaxBlocksize && kMinBlocksize % kOctet == 0);

struct Octet {
  float value[kOctet];
};

// The first value of this thread's octet, and how many of its values are there.
struct OctetPlace {
  std::int64_t first;
  int count;        // 0..8
  bool whole_warp;  // 8 in each of the warp's lanes

  __device__ OctetPlace(std::int64_t tile, std::int64_t n)
      : first(tile * kTileValues + thread_index() * kOctet),
        count(n - first >= kOctet ? kOctet
              : n > first         ? static_cast<int>(n - first)
                                  : 0),
        whole_warp(first - lane_index() * kOctet + kWarpSize * kOctet <= n) {}
};

// Two lanes and their 16 consecutive fp32 values, in two accesses a lane. Side by side, they fill
// whole sectors: the first access moves the even lane's octet, half of it by each lane, the second
// the odd lane's. `Halves` are what a lane moves itself.
struct Halves {
  Vec<float, 4> of_even, of_odd;

  // Where a lane's half of the even lane's octet begins; of the odd lane's, eight values on.
  __device__ static std::int64_t begin(OctetPlace at) {
    const int odd = lane_index() % 2;
    return at.first - odd * kOctet + odd * 4;
  }
};

__device__ inline Octet join(const Halves& halves) {
  const bool odd = lane_index() % 2 != 0;
  Octet octet;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float even_half = halves.of_even.value[i];
    const float odd_half = halves.of_odd.value[i];
    const float got = shuffle_xor(odd ? even_half : odd_half, 1);
    octet.value[i] = odd ? got : even_half;
    octet.value[i + 4] = odd ? odd_half : got;
  }
  return octet;
}

__device__ inline Halves split(const Octet& octet) {
  const bool odd = lane_index() % 2 != 0;
  Halves halves;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float low = octet.value[i];
    const float high = octet.value[i + 4];
    const float got = shuffle_xor(odd ? low : high, 1);
    halves.of_even.value[i] = odd ? got : low;
    halves.of_odd.value[i] = odd ? high : got;
  }
  return halves;
}

// Values past the count are 0. T is const where nothing writes x during the launch. `aligned`, to
// 16 bytes, is the same for all threads.
template <class T>
__device__ Octet load_octet(Global<T> x, OctetPlace at, bool aligned) {
  Octet octet;
  if (aligned && at.whole_warp) {
    if constexpr (sizeof(T) == sizeof(float)) {
      const std::int64_t begin = Halves::begin(at);
      return join({x.template load_vec<4>(begin), x.template load_vec<4>(begin + kOctet)});
    } else {
      const auto values = x.template load_vec<kOctet>(at.first);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) octet.value[i] = widen(values.value[i]);
      return octet;
    }
  }
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    octet.value[i] = i < at.count ? widen(x.load(at.first + i)) : 0.0f;
  }
  return octet;
}

template <class T>
__device__ void store_octet(Global<T> out, OctetPlace at, bool aligned, const Octet& octet) {
  if (aligned && at.whole_warp) {
    if constexpr (sizeof(T) == sizeof(float)) {
      const std::int64_t begin = Halves::begin(at);
      const Halves halves = split(octet);
      out.store_vec(begin, halves.of_even);
      out.store_vec(begin + kOctet, halves.of_odd);
    } else {
      Vec<T, kOctet> values;
#pragma unroll
      for (int i = 0; i < kOctet; ++i) values.value[i] = narrow<T>(octet.value[i]);
      out.store_vec(at.first, values);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    if (i < at.count) out.store(at.first + i, narrow<T>(octet.value[i]));
  }
}

// Eight bytes, the first value's in the lowest.
struct OctetBytes {
  std::uint32_t word[2];

  [[nodiscard]] __device__ std::uint8_t get(int i) const {
    return static_cast<std::uint8_t>(word[i / 4] >> (i % 4 * 8));
  }
  __device__ void set(int i, std::uint32_t byte) { word[i / 4] |= byte << (i % 4 * 8); }
};

// Bytes past the count are `rest`.
template <class Byte>
__device__ OctetBytes load_octet_bytes(Global<Byte> x, OctetPlace at, bool aligned,
                                       std::uint8_t rest) {
  if (aligned && at.whole_warp) {
    return std::bit_cast<OctetBytes>(x.template load_vec<kOctet>(at.first));
  }
  OctetBytes bytes{};
#pragma unroll
  for (int i = 0; i < kOctet; ++i) bytes.set(i, i < at.count ? x.load(at.first + i) : rest);
  return bytes;
}

__device__ inline void store_octet_bytes(Global<std::uint8_t> out, OctetPlace at, bool aligned,
                                         OctetBytes bytes) {
  if (aligned && at.whole_warp) {
    out.store_vec(at.first, std::bit_cast<Vec<std::uint8_t, 8>>(bytes));
    return;
  }
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    if (i < at.count) out.store(at.first + i, bytes.get(i));
  }
}

}  // namespace qlora::cuda
