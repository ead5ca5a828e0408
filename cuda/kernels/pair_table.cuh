// The two values of a byte of codes by one look-up: byte -> two 16-bit values in a word.
//
//   row of the table = byte         | 32 copies of the word, one a lane | 128 bytes of something
//   else | 256 rows of 256 bytes           | bank = lane                       | the code ring
//   (code_ring.cuh)|
//
// A lane reads its own copy, so its own bank: no two lanes ever meet, whatever the codes. 32 copies
// of 256 words are 32 kB. A row could be those 128 bytes alone; it is 256 bytes apart because a
// byte's row then begins at byte * 256, and one instruction (prmt) both cuts the byte out of a word
// of codes and adds the lane's offset below it. Rows of 128 bytes would take a shift and a mask and
// a sum more than the look-up itself. The gaps are not lost: the ring of codes lies in them.
//
// What it costs, for a byte (two values): a prmt and a 4-byte look-up. Shared memory gives 32 of
// these a clock and multiprocessor, 64 values. A look-up by shuffle gives one value a lane and is
// capped at 32 values a clock; an H200 delivers 41 (4.8 TB/s, 132 multiprocessors, 1.76 GHz), an
// H100 29, an A100 (2 TB/s) 27.
#pragma once

#include <bit>
#include <cstdint>

#include "device/bytes.cuh"
#include "device/convert.cuh"
#include "device/shared.cuh"
#include "device/thread.cuh"

namespace qlora::cuda {

inline constexpr int kPairs = 256;
inline constexpr int kPairRow = 256;  // bytes from a row to the next
inline constexpr int kPairTableBytes = kPairs * kPairRow;
inline constexpr int kLaneCopies = kWarpSize * 4;  // bytes
inline constexpr int kPairGapBytes = kPairTableBytes / 2;

// Where byte i of the gaps lies, which are 128 bytes each.
__device__ constexpr int gap_byte(int i) {
  return i / kLaneCopies * kPairRow + kLaneCopies + i % kLaneCopies;
}

template <class T>
__device__ std::uint32_t pair_word(float first, float second) {
  static_assert(sizeof(T) == 2);
  return std::uint32_t{narrow<T>(first).bits} | std::uint32_t{narrow<T>(second).bits} << 16;
}

// Thread i sets up the rows i, i + threads, …; wait at a barrier before they are read. A thread
// begins at a column of its own among eight neighbours, so that these fill all banks at a time.
template <class T>
__device__ void load_pair_table(Shared<std::uint32_t> table, const float (&values)[16]) {
  constexpr int kRowWords = kPairRow / 4, kColumns = kLaneCopies / 16;
  for (int i = thread_index(); i < kPairs; i += block_threads()) {
    const std::uint32_t word = pair_word<T>(values[i / 16], values[i % 16]);
    for (int j = 0; j < kColumns; ++j) {
      const int column = (i + j) % kColumns;
      table.store_vec(i * kRowWords + column * 4, Vec<std::uint32_t, 4>{{word, word, word, word}});
    }
  }
}

// Byte `i` of four.
__device__ inline std::uint32_t look_up_pair(Shared<std::uint8_t> table, std::uint32_t codes,
                                             int i) {
  const auto lane_offset = static_cast<std::uint32_t>(lane_index() * 4);
  // Lowest byte: the lane's offset; above it the codes' byte; above that zeros.
  const std::uint32_t selector = 0x5504u | static_cast<std::uint32_t>(i) << 4;
  const std::uint32_t at = permute_bytes(codes, lane_offset, selector);
  return std::bit_cast<std::uint32_t>(table.load_vec<4>(static_cast<int>(at)));
}

}  // namespace qlora::cuda
