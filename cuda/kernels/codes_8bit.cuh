// float -> nearest code of the dynamic 8-bit maps, by the bucket table of tables.cuh in shared
// memory. One look-up a code, at whatever bank it lies: two to four lanes meet, on average.
#pragma once

#include <bit>
#include <cstdint>

#include "device/shared.cuh"
#include "device/thread.cuh"
#include "kernels/tables.cuh"

namespace qlora::cuda {

template <bool kSigned>
using SharedCodes = SharedArray<std::uint32_t, CodeTable<kSigned>::kWords>;

// The table in shared memory; wait at a barrier before it is read.
template <bool kSigned>
__device__ void load_codes_table(SharedCodes<kSigned>& codes) {
  const Global<const std::uint32_t> words = code_table_words<kSigned>();
  for (int i = thread_index(); i < CodeTable<kSigned>::kWords; i += block_threads()) {
    codes.store(i, words.load(i));
  }
}

// The nearer end where x is outside [-1, 1], and the lowest code for NaN.
template <bool kSigned>
__device__ std::uint32_t encode_8bit(SharedCodes<kSigned>& codes, float x) {
  using Table = CodeTable<kSigned>;
  constexpr float kLowest = kSigned ? -1.0f : 0.0f;
  x = x > kLowest ? x : kLowest;
  x = x < 1.0f ? x : 1.0f;
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const bool negative = kSigned && bits >> 31 != 0;
  const int key = static_cast<int>((bits & 0x7FFFFFFFu) >> Table::kLowBits) - Table::kLowestKey;
  const int bucket = (key > 0 ? key : 0) + (negative ? Table::kBuckets : 0);
  const std::uint32_t word = codes.load(bucket);
  const std::uint32_t low = (negative ? ~bits : bits) & Table::kLowMask;
  return (word >> 24) + (low > (word & 0xFFFFFFu) ? 1u : 0u);
}

}  // namespace qlora::cuda
