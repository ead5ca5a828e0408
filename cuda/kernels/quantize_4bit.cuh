// Blockwise 4-bit quantization: absmax of a block, then the code of every value over it.
//
//   code = order[how many midpoints are below x / absmax]          (format.h; a tie goes down)
//
// in the arithmetic of the CPU backend, to the bit: a full block multiplies with
// 1 / max(absmax, 1e-38), the last, partial one divides by max(absmax, 1e-38) and stores that.
//
// Limiter: memory. It moves 2.56 bytes a bf16 value (blocksize 64); at 3.35 TB/s an H100 can spend
// 22 instructions on a value, and fifteen comparisons would take 30. So the search is one look-up:
// rounding 15 x to an integer names one of 31 bins over [-1, 1], which holds at most one midpoint:
//
//   code = bin.below + (x > bin.limit)                                   some 12 instructions
//
// The table of bins stands in shared memory once for each lane, bin after bin, 8 bytes an entry: a
// half-warp's 16 entries always cover the 32 banks, so no two lanes meet, whatever the values.
// FP4's three midpoints about zero share a bin; it takes the fifteen comparisons.
//
// Data path: a thread's octet of x -> registers -> shuffles (block_absmax.cuh) -> 8 codes -> 4
// bytes, 128 contiguous bytes of codes a warp.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "device/global.cuh"
#include "device/shared.cuh"
#include "kernels/block_absmax.cuh"
#include "kernels/tile.cuh"
#include "qlora_native/format.h"
#include "qlora_native/layout.h"

namespace qlora::cuda {

struct alignas(8) Bin {
  float limit;  // the bin's midpoint, or infinity
  int below;    // midpoints below the bin
};

inline constexpr int kBins = 32;
inline constexpr float kBinsPerUnit = 15.0f;
inline constexpr int kMiddleBin = 16;

// Adding it leaves an integer's bits in the low end of the sum's mantissa, rounded to nearest.
inline constexpr float kRoundToInteger = 12582912.0f;  // 1.5 * 2^23

constexpr int bin_of(float x) {
  const float position = x * kBinsPerUnit;
  return static_cast<int>(position < 0.0f ? position - 0.5f : position + 0.5f) + kMiddleBin;
}

struct Bins {
  Bin bin[kBins];
};

constexpr Bins make_bins(const float (&midpoints)[15]) {
  Bins bins{};
  for (int i = 0; i < kBins; ++i) {
    bins.bin[i] = {std::numeric_limits<float>::infinity(), 0};
    for (const float midpoint : midpoints) {
      if (bin_of(midpoint) == i) bins.bin[i].limit = midpoint;
      if (bin_of(midpoint) < i) ++bins.bin[i].below;
    }
  }
  return bins;
}

// Whether no two midpoints share a bin, and none is so near a bin's edge that rounding decides.
constexpr bool fit_bins(const float (&midpoints)[15]) {
  for (int i = 0; i < 15; ++i) {
    if (i > 0 && bin_of(midpoints[i]) == bin_of(midpoints[i - 1])) return false;
    if (bin_of(midpoints[i] - 1e-4f) != bin_of(midpoints[i] + 1e-4f)) return false;
  }
  return true;
}

constexpr bool codes_ascend(const Format& format) {
  for (int i = 0; i < 16; ++i) {
    if (format.order[i] != i) return false;
  }
  return true;
}
static_assert(fit_bins(kNf4.midpoints) && codes_ascend(kNf4));

template <class T>
struct Quantize4bitArguments {
  std::int64_t n;
  int log2_blocksize;
  bool x_aligned;       // to 16 bytes
  bool packed_aligned;  // to 4 bytes
  std::uint8_t zero_code;
  Global<const T> x;            // [n]
  Global<std::uint8_t> packed;  // [ceil(n/2)]
  Global<float> absmax;         // [n_blocks]
  std::uint64_t order;          // a nibble for each count
  float midpoints[15];
  Bins bins;
};

using LaneBins = SharedArray<Bin, kBins * kWarpSize>;  // [bin][lane]

// How many midpoints are below x, of which |x| <= 1 but for a rounding; all of them for NaN.
template <bool kBinned, class T>
__device__ int count_below(const Quantize4bitArguments<T>& p, LaneBins& bins, float x) {
  x = fminf(x, 1.0f);  // NaN, too, becomes 1
  if constexpr (kBinned) {
    const auto bits = std::bit_cast<std::uint32_t>(fmaf(x, kBinsPerUnit, kRoundToInteger));
    const int index = static_cast<int>((bits + kMiddleBin) % kBins);
    const Bin bin = bins.load(index * kWarpSize + lane_index());
    return bin.below + (x > bin.limit ? 1 : 0);
  } else {
    int count = 0;
#pragma unroll
    for (int i = 0; i < 15; ++i) count += x > p.midpoints[i] ? 1 : 0;
    return count;
  }
}

// Eight codes as four bytes, the first in the high nibble of the lowest.
__device__ inline std::uint32_t pack_codes(const int (&code)[kOctet]) {
  std::uint32_t packed = 0;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    packed |= static_cast<std::uint32_t>(code[i]) << (i % 2 == 0 ? 4 * i + 4 : 4 * i - 4);
  }
  return packed;
}

__device__ inline void store_codes(Global<std::uint8_t> packed, OctetPlace at, bool aligned,
                                   std::uint32_t codes, std::uint8_t zero_code) {
  if (aligned && at.whole_warp) {
    packed.store_vec(at.first / 2, std::bit_cast<Vec<std::uint8_t, 4>>(codes));
    return;
  }
#pragma unroll
  for (int i = 0; i < kOctet; i += 2) {
    std::uint32_t byte = codes >> (4 * i) & 0xFFu;
    if (i + 1 == at.count) byte = (byte & 0xF0u) | zero_code;
    if (i < at.count) packed.store((at.first + i) / 2, static_cast<std::uint8_t>(byte));
  }
}

template <class T, bool kBinned, bool kWide>
__global__ void __launch_bounds__(kTileThreads)
    quantize_4bit_kernel(const __grid_constant__ Quantize4bitArguments<T> p) {
  __shared__ LaneBins bins;
  __shared__ WarpMaxima maxima;
  if constexpr (kBinned) {
    for (int i = thread_index(); i < kBins * kWarpSize; i += kTileThreads) {
      bins.store(i, p.bins.bin[i / kWarpSize]);
    }
    sync_block();
  }

  const std::int64_t tiles = ceil_div(p.n, kTileValues);
  int turn = 0;
  for (std::int64_t tile = block_index(); tile < tiles; tile += grid_blocks(), turn ^= 1) {
    const OctetPlace at(tile, p.n);
    const Octet x = load_octet(p.x, at, p.x_aligned);
    std::uint32_t largest = 0;
#pragma unroll
    for (const float value : x.value) largest = larger(largest, magnitude_bits(value));
    const float absmax = block_absmax<kWide>(largest, p.log2_blocksize, maxima, turn);
    const float divisor = absmax < kSmallestDivisor ? kSmallestDivisor : absmax;

    const std::int64_t block = at.first >> p.log2_blocksize;
    const bool is_full = ((block + 1) << p.log2_blocksize) <= p.n;
    const bool is_first = at.first == block << p.log2_blocksize;
    if (is_first && at.count > 0) p.absmax.store(block, is_full ? absmax : divisor);

    const float inverse = 1.0f / divisor;
    int code[kOctet];
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      const float normed = is_full ? x.value[i] * inverse : x.value[i] / divisor;
      const int count = count_below<kBinned>(p, bins, normed);
      code[i] = kBinned ? count : static_cast<int>(p.order >> (4 * count) & 0xFu);
    }
    store_codes(p.packed, at, p.packed_aligned, pack_codes(code), p.zero_code);
  }
}

}  // namespace qlora::cuda
