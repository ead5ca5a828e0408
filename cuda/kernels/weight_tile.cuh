// A tile of a 4-bit weight: from codes in global memory to 16-bit values in panels, each value
// dequantized once for a block of threads.
//
// The tile has kWeightTile values, 32 for each thread: 16 bytes of codes, which never cross a row
// (columns % 32 == 0) nor, with that, a block of 32 or more values, wherever blocks begin and end:
// one scale a thread. The codes wait in registers while the step before is computed.
//
// Exact: value(code) * absmax in fp32, rounded once to T, as dequantization has it. A thread
// multiplies its scale with the format's 16 values and looks its 32 codes up in the rounded
// products, which fill 8 registers: a code's lower three bits are a selector of prmt. Per value:
//
//   products and their rounding 1, selectors and look-up 2.1, putting bytes together 0.5
//
// instructions, and none of them touches shared memory, which matrix loads keep busy. (A look-up in
// a table there costs 4.5 with its product, and a quarter of that memory's time.)
//
// Threads and panels: the tile is cut into panels of 64 columns, a panel into rows of two halves.
// Eight neighbouring threads hold both halves of four rows, and what they store at a time, one
// piece each, lies in eight groups of banks. In global memory the halves of a row are a sector.
#pragma once

#include <bit>
#include <cstdint>

#include "device/bytes.cuh"
#include "device/convert.cuh"
#include "kernels/panel.cuh"
#include "kernels/scales.cuh"

namespace qlora::cuda {

inline constexpr int kWeightChunk = kWeightTile / kLinearThreads;  // values of a thread
static_assert(kWeightChunk == 32 && kWeightChunk <= kMinBlocksize);

struct TileWeight {
  std::int64_t rows;
  std::int64_t columns;  // a multiple of kWeightChunk
  int log2_blocksize;
  bool double_quantized;
  Global<const std::uint8_t> packed;  // [rows * columns / 2], aligned to 16 bytes
  DeviceScales scales;
  float values[16];  // by code
};

// What the scale of a chunk is made of.
struct ChunkScale {
  std::uint32_t scale;  // the bits of absmax, or its code
  float nested_absmax;
  float nested_offset;  // with each chunk: a register that is free while products are looked up
};

// A thread's codes, two a byte, the first in the upper half; and their scale.
struct WeightChunk {
  struct Codes {
    std::uint32_t word[4];
  } codes;
  ChunkScale scale;
};

// Where a thread's chunk lies in a tile of kRows rows.
template <int kRows>
struct ChunkPlace {
  int row;
  int column;

  __device__ ChunkPlace()
      : row(thread_index() / 2 % kRows),
        column(thread_index() / (2 * kRows) * kPanelColumns + thread_index() % 2 * kWeightChunk) {}

  // Of piece i, in the panels at element `base`.
  [[nodiscard]] __device__ int index(int base, int piece) const {
    const int panel = column / kPanelColumns * (kRows * kPanelColumns);
    const int own = panel + (panel_row(row) ^ (column & (kPanelColumns - 1)));
    return (base + own) ^ (piece * kPiece);
  }
};

// Of the chunk whose first value is that one.
__device__ inline ChunkScale load_chunk_scale(const TileWeight& weight, std::int64_t first) {
  ChunkScale scale{};
  const std::int64_t block = first >> weight.log2_blocksize;
  if (weight.double_quantized) {
    scale.scale = weight.scales.absmax_q8.load(block);
    scale.nested_absmax = weight.scales.nested_absmax.load(block / kNestedBlocksize);
    scale.nested_offset = weight.scales.nested_offset.load(0);
  } else {
    scale.scale = std::bit_cast<std::uint32_t>(weight.scales.absmax.load(block));
  }
  return scale;
}

// The chunk at (row, column) of the weight. Outside of it: codes whose scale is zero.
__device__ inline WeightChunk load_weight_chunk(const TileWeight& weight, std::int64_t row,
                                                std::int64_t column) {
  WeightChunk chunk{};
  if (row >= weight.rows || column >= weight.columns) return chunk;
  const std::int64_t first = row * weight.columns + column;
  chunk.codes =
      std::bit_cast<WeightChunk::Codes>(weight.packed.load_vec<kWeightChunk / 2>(first / 2));
  chunk.scale = load_chunk_scale(weight, first);
  return chunk;
}

// The format's values times a scale, rounded to T: the lower and the upper bytes of all 16.
template <class T>
class ScaledValues {
 public:
  __device__ ScaledValues(const float (&values)[16], float scale) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* v = values + 4 * i;
      const std::uint32_t first = narrow_pair<T>(v[0] * scale, v[1] * scale);
      const std::uint32_t second = narrow_pair<T>(v[2] * scale, v[3] * scale);
      low_[i] = permute_bytes(first, second, 0x6420);
      high_[i] = permute_bytes(first, second, 0x7531);
    }
  }

  // Of eight codes.
  [[nodiscard]] __device__ Vec<T, 8> look_up(std::uint32_t codes) const {
    struct Words {
      std::uint32_t word[4];
    } result;
    // Selectors are nibbles from the lowest up, and there the codes of a byte stand the wrong way
    // round: 1, 0, 3, 2. The last step, which puts lower and upper bytes together, turns them.
    const std::uint32_t lower_bits = codes & 0x77777777u;
    const std::uint32_t shifted = codes << 4;  // bit 3 of codes 1, 3, … to the bytes' signs
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::uint32_t selector = lower_bits >> (16 * half);
      const std::uint32_t from_upper_half =
          permute_bytes(codes, shifted, half == 0 ? 0x9D8Cu : 0xBFAEu);
      const std::uint32_t low = pick(low_, selector, from_upper_half);
      const std::uint32_t high = pick(high_, selector, from_upper_half);
      result.word[2 * half] = permute_bytes(low, high, 0x4051);
      result.word[2 * half + 1] = permute_bytes(low, high, 0x6273);
    }
    return std::bit_cast<Vec<T, 8>>(result);
  }

 private:
  // A byte for each of four codes; `upper` has all bits set where a code is 8 or more.
  __device__ static std::uint32_t pick(const std::uint32_t (&bytes)[4], std::uint32_t selector,
                                       std::uint32_t upper) {
    const std::uint32_t of_lower_half = permute_bytes(bytes[0], bytes[1], selector);
    const std::uint32_t of_upper_half = permute_bytes(bytes[2], bytes[3], selector);
    return (of_upper_half & upper) | (of_lower_half & ~upper);
  }

  std::uint32_t low_[4];
  std::uint32_t high_[4];
};

// Where the weight is double-quantized the map must have been loaded, and a barrier passed.
__device__ inline float absmax_of(const TileWeight& weight, const ChunkScale& scale,
                                  DynamicMap& map) {
  if (!weight.double_quantized) return std::bit_cast<float>(scale.scale);
  return map.load(static_cast<int>(scale.scale)) * scale.nested_absmax + scale.nested_offset;
}

}  // namespace qlora::cuda
