// Blockwise 4-bit quantization: absmax of a block, then the code of every value over it.
//
//   code = order[how many midpoints are below x / absmax]          (format.h; a tie goes down)
//
// bitsandbytes' arithmetic to the bit: a full block multiplies with 1 / max(absmax, 1e-38) in fp32,
// and the last, partial one divides by max(absmax, 1e-38) and stores that as its absmax. A NaN
// makes its block's absmax NaN and every code the highest; infinity makes absmax infinite, finite
// values zero and itself the highest code.
//
// A block is read twice, the second time from the L1 cache (at most 16 kB), and its codes are
// packed in registers, 32 at a time. The search costs about as much as reading bf16 from memory,
// less than reading fp32.
#pragma once

#include <cstdint>
#include <cstring>

#include "dispatch.h"
#include "parallel.h"
#include "qlora_native/backend.h"
#include "qlora_native/layout.h"

namespace qlora::cpu {

inline constexpr float kSmallestDivisor = 1e-38f;
inline constexpr int kChunk = 32;  // values whose codes are packed together; the smallest block

// What does not change from block to block.
template <class V>
struct Encoder4bit {
  typename V::Midpoints midpoints;
  typename V::Bytes order;
  bool ordered;  // codes ascend with their values
  std::uint8_t zero_code;

  explicit Encoder4bit(const Format& format)
      : midpoints(V::midpoints(format.midpoints)),
        order(V::bytes(format.order)),
        ordered(format.order[0] == 0 && format.order[15] == 15),
        zero_code(format.zero_code) {}
};

// |x| of the largest value, NaN if there is any; count is a multiple of kChunk.
template <class V, class T>
float largest_magnitude(const T* x, std::int64_t count) {
  auto even = V::zero();
  auto odd = V::zero();
  for (std::int64_t i = 0; i < count; i += 2 * V::kWidth) {
    even = V::max_magnitude(even, V::load(x + i));
    odd = V::max_magnitude(odd, V::load(x + i + V::kWidth));
  }
  return V::reduce_max_magnitude(V::max_magnitude(even, odd));
}

// kChunk codes of x[i], each first passed through `normalize`, to kChunk / 2 bytes.
template <class V, bool kOrdered, class T, class Normalize>
void encode_chunk(const Encoder4bit<V>& encoder, const T* x, const Normalize& normalize,
                  std::uint8_t* packed) {
  constexpr int kVectors = kChunk / V::kWidth;
  typename V::I codes[kVectors];
  for (int j = 0; j < kVectors; ++j) {
    codes[j] = V::count_below(encoder.midpoints, normalize(V::load(x + j * V::kWidth)));
    if constexpr (!kOrdered) codes[j] = V::lookup_bytes(encoder.order, codes[j]);
  }
  V::pack_codes(packed, codes);
}

template <class V, bool kOrdered, class T>
void encode_full_block(const Encoder4bit<V>& encoder, const T* x, std::int64_t blocksize,
                       std::uint8_t* packed, float* absmax) {
  *absmax = largest_magnitude<V>(x, blocksize);
  const float divisor = *absmax < kSmallestDivisor ? kSmallestDivisor : *absmax;
  const auto inverse = V::set1(1.0f / divisor);
  const auto normalize = [&](typename V::F v) { return V::mul(v, inverse); };
  for (std::int64_t i = 0; i < blocksize; i += kChunk) {
    encode_chunk<V, kOrdered>(encoder, x + i, normalize, packed + i / 2);
  }
}

// 0 < count < blocksize values, and the padding of an odd one.
template <class V, bool kOrdered, class T>
void encode_partial_block(const Encoder4bit<V>& encoder, const T* x, std::int64_t count,
                          std::uint8_t* packed, float* absmax) {
  const std::int64_t whole = count / kChunk * kChunk;
  T rest[kChunk] = {};
  std::memcpy(rest, x + whole, static_cast<std::size_t>(count - whole) * sizeof(T));
  const float largest[2] = {largest_magnitude<V>(x, whole), largest_magnitude<V>(rest, kChunk)};
  const auto both = V::load_n(largest, 2);
  const float found = V::reduce_max_magnitude(both);
  *absmax = found < kSmallestDivisor ? kSmallestDivisor : found;

  const auto divisor = V::set1(*absmax);
  const auto normalize = [&](typename V::F v) { return V::div(v, divisor); };
  for (std::int64_t i = 0; i < whole; i += kChunk) {
    encode_chunk<V, kOrdered>(encoder, x + i, normalize, packed + i / 2);
  }
  std::uint8_t bytes[kChunk / 2];
  encode_chunk<V, kOrdered>(encoder, rest, normalize, bytes);
  if (count % 2 != 0) {
    std::uint8_t& last = bytes[(count - whole) / 2];
    last = static_cast<std::uint8_t>((last & 0xF0) | encoder.zero_code);
  }
  std::memcpy(packed + whole / 2, bytes, static_cast<std::size_t>(packed_bytes(count - whole)));
}

template <class V, bool kOrdered, class T>
void encode_blocks(const Quantize4bitParams& p, const Encoder4bit<V>& encoder, std::int64_t begin,
                   std::int64_t end) {
  const T* const x = static_cast<const T*>(p.x);
  for (std::int64_t block = begin; block < end; ++block) {
    const std::int64_t first = block * p.blocksize;
    const std::int64_t count = p.n - first;
    std::uint8_t* const packed = p.packed + first / 2;
    if (count >= p.blocksize) {
      encode_full_block<V, kOrdered>(encoder, x + first, p.blocksize, packed, &p.absmax[block]);
    } else {
      encode_partial_block<V, kOrdered>(encoder, x + first, count, packed, &p.absmax[block]);
    }
  }
}

// A thread is worth waking for this many values.
inline constexpr std::int64_t kQuantizeGrain = 32768;

template <class V>
Status quantize_4bit(const Quantize4bitParams& p, const Context& context) {
  const Encoder4bit<V> encoder(p.format);
  const std::int64_t blocks = n_blocks(p.n, p.blocksize);
  const auto run = [&](std::int64_t begin, std::int64_t end) {
    with_type(p.dtype, [&]<class T>() {
      if (encoder.ordered) {
        encode_blocks<V, true, T>(p, encoder, begin, end);
      } else {
        encode_blocks<V, false, T>(p, encoder, begin, end);
      }
    });
  };
  parallel_for(context, blocks, ceil_div(kQuantizeGrain, p.blocksize), run);
  return {};
}

}  // namespace qlora::cpu
