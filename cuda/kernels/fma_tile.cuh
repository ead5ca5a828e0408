// The fp32 product of two operands on the CUDA cores, a tile [kTileI, kTileJ] to a block of
// threads:
//
//   sums[i, j] += left(i, d) * right(j, d)     over d in [begin, end), ascending, by fused
//                                              multiply-adds in fp32, one sum a step, added up
//
// An operand is an object that fetches a quad, four values that lie together in memory: along the
// depth, (c, d .. d+3), or across it, (c .. c+3, d). Any types, any layout, values decoded or
// masked on the way: all that is the operand's matter.
//
//   registers   a thread has 4 x 4 sums, and those of the step
//   shared      both operands [32 depth][columns] in fp32, in two buffers: while one is multiplied,
//               the next step's quads are on their way into registers; one barrier a step
//   a step      a thread reads two Vec4 for 16 fused multiply-adds
//
// No bank conflicts: column c of depth d stands at c ^ 4 (d / 4 % 8). A warp that stores quads
// along the depth has 8 depths d/4 and 4 neighbouring columns, so 32 banks; one that stores across
// it stores whole Vec4s of a row, which the exclusive-or only permutes within 128 bytes; and the
// product's reads are of one depth: Vec4s of a row or a broadcast. Rows have 32 columns at least.
#pragma once

#include <cmath>
#include <cstdint>

#include "device/convert.cuh"
#include "device/global.cuh"
#include "device/shared.cuh"
#include "device/thread.cuh"

namespace qlora::cuda {

inline constexpr int kQuad = 4;
inline constexpr int kStepDepth = 32;  // also of a partial sum: one long sum loses bits

struct Quad {
  float value[kQuad];
};

template <int kTile>
struct OperandTile {
  static constexpr int kPitch = kTile < 32 ? 32 : kTile;
  SharedArray<float, 2 * kStepDepth * kPitch> data;  // [buffer][depth][column]

  __device__ static int place(int buffer, int d, int c) {
    return (buffer * kStepDepth + d) * kPitch + (c ^ (d / 4 % 8 * 4));
  }
};

template <int kTileI, int kTileJ>
struct FmaTile {
  static constexpr int kThreads = kTileI * kTileJ / (kQuad * kQuad);
  static constexpr int kAcross = kTileJ / kQuad;  // threads side by side

  struct Memory {
    OperandTile<kTileI> left;
    OperandTile<kTileJ> right;
  };

  struct Sums {
    float value[kQuad][kQuad];
  };
  Sums sums{};

  // This thread's first row and column in the tile.
  __device__ static int row() { return thread_index() / kAcross * kQuad; }
  __device__ static int col() { return thread_index() % kAcross * kQuad; }

  // All threads of the block; begins with a barrier.
  template <class Left, class Right>
  __device__ void multiply(Memory& memory, const Left& left, const Right& right,
                           std::int64_t first_i, std::int64_t first_j, std::int64_t begin,
                           std::int64_t end) {
    Fetched<kTileI, Left> next_left;
    Fetched<kTileJ, Right> next_right;
    sync_block();  // tables are there, and an earlier product has been read
    next_left.fetch(left, first_i, begin, end);
    next_right.fetch(right, first_j, begin, end);
    int buffer = 0;
    for (std::int64_t d = begin; d < end; d += kStepDepth) {
      next_left.store(memory.left, buffer);
      next_right.store(memory.right, buffer);
      sync_block();
      next_left.fetch(left, first_i, d + kStepDepth, end);
      next_right.fetch(right, first_j, d + kStepDepth, end);
      multiply_step(memory, buffer);
      buffer ^= 1;
    }
  }

 private:
  // The quads of a step that this thread brings, on their way from memory to shared memory.
  template <int kTile, class Operand>
  struct Fetched {
    static constexpr int kQuads = kTile * kStepDepth / kQuad;  // of all threads
    static constexpr int kEach = (kQuads + kThreads - 1) / kThreads;
    static_assert(kQuads % kThreads == 0);
    Quad quad[kEach];

    // Column and depth of quad q in the tile.
    __device__ static int column(int q) {
      const int t = q * kThreads + thread_index();
      if constexpr (Operand::kAlongDepth) return t / kWarpSize * 4 + t % 4;
      if constexpr (!Operand::kAlongDepth) return t % (kTile / kQuad) * kQuad;
    }
    __device__ static int depth(int q) {
      const int t = q * kThreads + thread_index();
      if constexpr (Operand::kAlongDepth) return t % kWarpSize / 4 * kQuad;
      if constexpr (!Operand::kAlongDepth) return t / (kTile / kQuad);
    }

    __device__ void fetch(const Operand& operand, std::int64_t first, std::int64_t d,
                          std::int64_t end) {
      if (d >= end) return;
#pragma unroll
      for (int q = 0; q < kEach; ++q) {
        quad[q] = operand.fetch(first + column(q), d + depth(q), end);
      }
    }

    __device__ void store(OperandTile<kTile>& tile, int buffer) const {
#pragma unroll
      for (int q = 0; q < kEach; ++q) {
        const int c = column(q), d = depth(q);
        if constexpr (Operand::kAlongDepth) {
#pragma unroll
          for (int i = 0; i < kQuad; ++i) {
            tile.data.store(tile.place(buffer, d + i, c), quad[q].value[i]);
          }
        } else {
          Vec<float, kQuad> values;
#pragma unroll
          for (int i = 0; i < kQuad; ++i) values.value[i] = quad[q].value[i];
          tile.data.store_vec(tile.place(buffer, d, c), values);
        }
      }
    }
  };

  __device__ void multiply_step(Memory& memory, int buffer) {
    Sums run{};
#pragma unroll 8
    for (int d = 0; d < kStepDepth; ++d) {
      const auto a = memory.left.data.template load_vec<kQuad>(memory.left.place(buffer, d, row()));
      const auto b =
          memory.right.data.template load_vec<kQuad>(memory.right.place(buffer, d, col()));
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
#pragma unroll
        for (int j = 0; j < kQuad; ++j) {
          run.value[i][j] = fmaf(a.value[i], b.value[j], run.value[i][j]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) sums.value[i][j] += run.value[i][j];
    }
  }
};

// ---- operands in memory ----

// [columns, depth] row-major: quads along the depth. Outside it is 0.
template <class T>
struct RowsOperand {
  static constexpr bool kAlongDepth = true;
  Global<const T> data;
  std::int64_t columns;
  std::int64_t depth;
  bool aligned;  // rows are whole quads, aligned to their size

  [[nodiscard]] __device__ Quad fetch(std::int64_t c, std::int64_t d, std::int64_t end) const {
    Quad quad{};
    if (c >= columns) return quad;
    if (aligned && d + kQuad <= end) {
      const auto values = data.template load_vec<kQuad>(c * depth + d);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) quad.value[i] = widen(values.value[i]);
      return quad;
    }
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (d + i < end) quad.value[i] = widen(data.load(c * depth + d + i));
    }
    return quad;
  }
};

// [depth, columns] row-major: quads across it.
template <class T>
struct ColumnsOperand {
  static constexpr bool kAlongDepth = false;
  Global<const T> data;
  std::int64_t columns;
  bool aligned;

  [[nodiscard]] __device__ Quad fetch(std::int64_t c, std::int64_t d, std::int64_t end) const {
    Quad quad{};
    if (d >= end) return quad;
    if (aligned && c + kQuad <= columns) {
      const auto values = data.template load_vec<kQuad>(d * columns + c);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) quad.value[i] = widen(values.value[i]);
      return quad;
    }
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (c + i < columns) quad.value[i] = widen(data.load(d * columns + c + i));
    }
    return quad;
  }
};

}  // namespace qlora::cuda
