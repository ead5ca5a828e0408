// Blockwise dequantization: code -> value * absmax, rounded once to fp32 and once more to a 16-bit
// output. Memory bandwidth is the limit: an output byte costs 1/8 (fp32) or 1/4 byte of codes.
#pragma once

#include <cstdint>

#include "cache.h"
#include "codes_8bit_inl.h"
#include "decode_inl.h"
#include "parallel.h"
#include "qlora_native/backend.h"
#include "qlora_native/dispatch.h"
#include "qlora_native/layout.h"

namespace qlora::cpu {

// A thread is worth waking for this many values.
inline constexpr std::int64_t kDequantizeGrain = 32768;

inline constexpr std::uintptr_t kStreamAlignment = 64;

// Whether the output goes past the caches. Where it is larger than the last of them, a line that is
// written through them is first read, and pushes out others before anyone reads it: 235 MB of fp32
// took 1.25 times as long, 117 MB of bf16 1.13 times (2 threads, Zen 4 with 32 MB, 2026-11-24).
template <class V>
bool is_streamed(const void* out, std::int64_t bytes) {
  return bytes > last_level_cache_bytes() &&
         reinterpret_cast<std::uintptr_t>(out) % kStreamAlignment == 0;
}

template <class V, Write kWrite, class T>
void decode_whole_blocks(const Weight4bit& weight, std::int64_t begin, std::int64_t end, T* out) {
  T* const first = out + begin * weight.blocksize;
  if (weight.blocksize == kMinBlocksize) {
    decode_blocks<V, kWrite, kMinBlocksize>(weight, begin, end, first);
  } else {
    decode_blocks<V, kWrite, 2 * kMinBlocksize>(weight, begin, end, first);
  }
}

template <class V>
Status dequantize_4bit(const Dequantize4bitParams& p, const Context& context) {
  const std::int64_t n = p.weight.rows * p.weight.cols;
  const std::int64_t blocksize = p.weight.blocksize;
  const bool streamed = is_streamed<V>(p.out, n * size_of(p.dtype));
  const auto run = [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t full = n / blocksize < end ? n / blocksize : end;
    with_type(p.dtype, [&]<class T>() {
      T* const out = static_cast<T*>(p.out);
      if (streamed) {
        decode_whole_blocks<V, Write::streamed>(p.weight, begin, full, out);
        V::stream_fence();
      } else {
        decode_whole_blocks<V, Write::cached>(p.weight, begin, full, out);
      }
      const std::int64_t rest = full * blocksize;
      if (full < end) decode_run<V>(p.weight, rest, n - rest, out + rest);
    });
  };
  parallel_for(context, n_blocks(n, blocksize), ceil_div(kDequantizeGrain, blocksize), run);
  return {};
}

// Values that are looked up before they are scaled and written: few, so that the writes of one run
// wait for memory while the next is looked up.
inline constexpr std::int64_t kDecodedRun = 64;

// out[i] = map[codes[i]] * scale + offset for i < count; without the sum where kOffset is false,
// for adding 0 would turn -0 into 0.
template <class V, bool kSigned, bool kOffset, class T>
void decode_block_8bit(const std::uint8_t* codes, std::int64_t count, float scale, float offset,
                       T* out) {
  const auto scaled = [&](typename V::F v) __attribute__((always_inline)) {
    const auto product = V::mul(v, V::set1(scale));
    if constexpr (kOffset) return V::add(product, V::set1(offset));
    return product;
  };
  for (std::int64_t begin = 0; begin < count; begin += kDecodedRun) {
    alignas(64) float values[kDecodedRun];
    const std::int64_t run = count - begin < kDecodedRun ? count - begin : kDecodedRun;
    decode_8bit<V, kSigned>(codes + begin, run, values);
    T* const to = out + begin;
    std::int64_t i = 0;
    for (; i + V::kWidth <= run; i += V::kWidth) V::store(to + i, scaled(V::load(values + i)));
    if (i < run) V::store_n(to + i, scaled(V::load_n(values + i, run - i)), run - i);
  }
}

template <class V, bool kSigned, bool kOffset>
void decode_8bit_blocks(const Dequantize8bitParams& p, float offset, const Context& context) {
  const auto run = [&](std::int64_t begin, std::int64_t end) {
    with_type(p.dtype, [&]<class T>() {
      for (std::int64_t block = begin; block < end; ++block) {
        const std::int64_t first = block * p.blocksize;
        const std::int64_t rest = p.n - first;
        decode_block_8bit<V, kSigned, kOffset>(
            p.codes + first, rest < p.blocksize ? rest : p.blocksize, p.absmax[block], offset,
            static_cast<T*>(p.out) + first);
      }
    });
  };
  parallel_for(context, n_blocks(p.n, p.blocksize), ceil_div(kDequantizeGrain, p.blocksize), run);
}

template <class V>
Status dequantize_8bit(const Dequantize8bitParams& p, const Context& context) {
  if (p.is_signed) {
    decode_8bit_blocks<V, true, false>(p, 0.0f, context);
  } else {
    decode_8bit_blocks<V, false, false>(p, 0.0f, context);
  }
  return {};
}

template <class V>
Status dequantize_scales(const DequantizeScalesParams& p, const Context& context) {
  decode_8bit_blocks<V, true, true>(p.as_8bit(), *p.scales.nested_offset, context);
  return {};
}

}  // namespace qlora::cpu
