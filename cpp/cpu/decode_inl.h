// Decodes runs of a packed 4-bit weight, anywhere in it: what dequantize_4bit writes out whole, and
// what the linear kernels read panel by panel.
//
// The sixteen values are multiplied with the block's scale, and rounded to a 16-bit output type,
// once and then only looked up: the same bits as value by value, at a few instructions for a whole
// block. A block starts at a whole byte, for block sizes are even, but a run may start at the low
// nibble of one (a row of an odd width).
#pragma once

#include <cstdint>
#include <cstring>

#include "qlora_native/layout.h"
#include "qlora_native/params.h"
#include "scales_inl.h"

namespace qlora::cpu {

// The values that a block's codes stand for, rounded to T where that is a 16-bit type.
template <class V, class T>
[[gnu::always_inline]] inline auto block_table(const typename V::Table& values, float scale) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return V::scaled(values, scale);
  } else {
    return V::template half_table<T>(V::scaled(values, scale));
  }
}

// How the values are written: through the caches, or past them, by vectors that must be aligned.
enum class Write { cached, streamed };

// `count` values whose first code is the high nibble of packed[0]. No byte past the last one that
// holds a code is read.
template <class V, Write kWrite>
[[gnu::always_inline]] inline void decode_aligned(const typename V::Table& table,
                                                  const std::uint8_t* packed, std::int64_t count,
                                                  float* out) {
  std::int64_t i = 0;
  for (; i + V::kWidth <= count; i += V::kWidth) {
    const auto values = V::lookup(table, V::unpack_codes(packed + i / 2));
    if constexpr (kWrite == Write::streamed) {
      V::stream(out + i, values);
    } else {
      V::store(out + i, values);
    }
  }
  if (i == count) return;
  std::uint8_t bytes[V::kWidth / 2] = {};
  std::memcpy(bytes, packed + i / 2, static_cast<std::size_t>(packed_bytes(count - i)));
  V::store_n(out + i, V::lookup(table, V::unpack_codes(bytes)), count - i);
}

template <class V, Write kWrite, class T>
[[gnu::always_inline]] inline void decode_aligned(const typename V::HalfTable& table,
                                                  const std::uint8_t* packed, std::int64_t count,
                                                  T* out) {
  constexpr int kRun = V::kDecoded;
  std::int64_t i = 0;
  for (; i + kRun <= count; i += kRun) {
    V::template store_decoded<kWrite == Write::streamed>(out + i, table, packed + i / 2);
  }
  if (i == count) return;
  std::uint8_t bytes[kRun / 2] = {};
  T values[kRun];
  std::memcpy(bytes, packed + i / 2, static_cast<std::size_t>(packed_bytes(count - i)));
  V::template store_decoded<false>(values, table, bytes);
  std::memcpy(out + i, values, static_cast<std::size_t>(count - i) * sizeof(T));
}

// out[0..count) = the weight's values first .. first + count - 1 in row-major order, as T.
template <class V, Write kWrite = Write::cached, class T>
void decode_run(const Weight4bit& weight, std::int64_t first, std::int64_t count, T* out) {
  const std::int64_t end = first + count;
  const auto values = V::table(weight.format.values);
  std::int64_t block = first / weight.blocksize;
  for (std::int64_t i = first; i < end; ++block) {
    const std::int64_t block_end = (block + 1) * weight.blocksize;
    const std::int64_t stop = block_end < end ? block_end : end;
    const auto table = block_table<V, T>(values, block_scale<V>(weight.scales, block));
    if (i % 2 != 0) {
      const auto byte = static_cast<std::uint8_t>(weight.packed[i / 2] << 4);
      decode_aligned<V, Write::cached>(table, &byte, 1, out);
      ++out;
      ++i;
    }
    decode_aligned<V, kWrite>(table, weight.packed + i / 2, stop - i, out);
    out += stop - i;
    i = stop;
  }
}

// The values of the whole blocks begin .. end - 1, from out[0] on; kStep divides the blocksize. The
// scales of some are found together, and nothing is left to do for each but its table and its
// look-ups: of a short block the rest costs as much as these do.
template <class V, Write kWrite, int kStep, class T>
void decode_blocks(const Weight4bit& weight, std::int64_t begin, std::int64_t end, T* out) {
  constexpr std::int64_t kTogether = 64;
  const auto values = V::table(weight.format.values);
  const std::int64_t blocksize = weight.blocksize;
  const std::uint8_t* packed = weight.packed + begin * blocksize / 2;
  for (std::int64_t first = begin; first < end; first += kTogether) {
    float scales[kTogether];
    const std::int64_t blocks = end - first < kTogether ? end - first : kTogether;
    block_scales<V>(weight.scales, first, blocks, scales);
    for (std::int64_t block = 0; block < blocks; ++block) {
      const auto table = block_table<V, T>(values, scales[block]);
      for (std::int64_t i = 0; i < blocksize; i += kStep) {
        decode_aligned<V, kWrite>(table, packed, kStep, out);
        packed += kStep / 2;
        out += kStep;
      }
    }
  }
}

}  // namespace qlora::cpu
