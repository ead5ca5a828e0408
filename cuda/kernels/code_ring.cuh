// The ring of stages in shared memory through which linear_few_rows.cuh streams the codes of W and
// x: while one stage is multiplied, the next three are on their way (cp.async, 16 bytes a thread).
//
// Both are permuted alike along K, so that a lane loads its part of a fragment as it lies. The
// mma's depth index k is a name only: of the 16 that lane quarter t = lane % 4 holds (2t, 2t + 1,
// 2t + 8, 2t + 9 of each step of 16) it here takes consecutive ones,
//
//   unit of 64 values:   | t = 0: 16 values | t = 1 | t = 2 | t = 3 |    8 bytes of codes a lane,
//   in mma step s:         4s … 4s + 3                                  32 bytes of x
//
// so four steps take a lane 8 bytes of codes a row and two 16-byte pieces of x (a unit of 32: half
// of either).
//
// A thread's sources and targets differ from step to step by what is the same for all, and a lane's
// places from row to row and column to column by multiples of eight rows, which exchanges of pieces
// leave alone: so all of it is computed once, and a step adds.
//
// Banks. A stage is made of 16-byte pieces, in lines of 128 bytes, all banks once. Codes are read
// by half a warp at a time, 4 rows x 32 bytes: the rows' pairs of pieces are exchanged by the row's
// number (piece ^ 2 row), so that four rows lie in four quarters of their lines. x is read by a
// quarter of a warp, 2 columns x 4 pieces: those of odd columns are at piece ^ 5, where those of
// even ones are not. Copies write eight pieces of a line, in whatever order.
#pragma once

#include <bit>
#include <cstdint>

#include "device/async_copy.cuh"
#include "device/global.cuh"
#include "device/shared.cuh"
#include "kernels/few_rows_shape.cuh"
#include "kernels/pair_table.cuh"

namespace qlora::cuda {

template <class Shape>
class CodeRing {
  static constexpr int kRowPieces = Shape::kDepth / kCodePiece;
  static constexpr int kPieces = Shape::kRows * kRowPieces;  // of a stage
  static constexpr int kOfThread = kPieces / kFewRowsThreads;
  static constexpr int kRowsBetween = kFewRowsThreads / kRowPieces;  // a thread's pieces
  static constexpr int kStagePitch = kPairTableBytes / Shape::kStages;
  static constexpr int kLaneBytes = Shape::kUnit / 8;
  static_assert(Shape::kStages * kPieces * 16 == kPairGapBytes, "the ring fills the gaps");
  static_assert(kRowsBetween % 8 == 0);

  // Where byte `byte` of row `row` lies in stage 0.
  __device__ static constexpr int place(int row, int byte) {
    constexpr int kRowsOfLine = kRowPieces < 8 ? 8 / kRowPieces : 1;
    constexpr int kLines = 4 / kRowsOfLine;  // that half a warp reads
    const int line = row / kRowsOfLine;
    const int exchange = line % kLines * 2 | (line / kLines & 1);
    return gap_byte(((row * kRowPieces + byte / 16) ^ exchange) * 16 + byte % 16);
  }
  // And how far the same byte of the eighth row after it lies from there.
  static constexpr int kEightRows = 8 * kRowPieces * 16 * 2;

 public:
  // What a lane multiplies of a row in a unit.
  using LaneCodes = Vec<std::uint32_t, kLaneBytes / 4>;

  // `memory`: the pair table's, in whose gaps the stages lie. Rows from first_row on.
  __device__ CodeRing(Shared<std::uint8_t> memory, Global<const std::uint8_t> packed,
                      std::int64_t n, int k, std::int64_t first_row, const FewRowsPlace<Shape>& at)
      : memory_(memory), packed_(packed) {
    const int row = thread_index() / kRowPieces, depth = thread_index() % kRowPieces * kCodePiece;
    to_ = place(row, depth / 2);
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
      const std::int64_t row_of_w = first_row + row + i * kRowsBetween;
      from_[i] = (row_of_w * k + depth) / 2;
      end_[i] = row_of_w < n ? k - depth : 0;
    }
#pragma unroll
    for (int unit = 0; unit < Shape::kUnitsOfChunk; ++unit) {
      const int byte =
          at.warp_depth * (kChunk / 2) + unit * (Shape::kUnit / 2) + at.quarter * kLaneBytes;
      lane_[unit] = place(at.group, byte) + at.warp_row * (kRowTiles * 2 * kEightRows);
    }
  }

  // Starts this thread's copies of the step at that depth; zeros where W has no such values.
  __device__ void copy(int stage, int depth) const {
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
      async_copy<16>(memory_, to_ + i * (kRowsBetween / 8 * kEightRows) + stage * kStagePitch,
                     packed_, from_[i] + depth / 2, depth < end_[i]);
    }
  }

  // Of that unit, in the lane's row of the warp's `eight`-th eight.
  [[nodiscard]] __device__ LaneCodes load(int stage, int eight, int unit) const {
    return std::bit_cast<LaneCodes>(
        memory_.load_vec<kLaneBytes>(lane_[unit] + eight * kEightRows + stage * kStagePitch));
  }

 private:
  Shared<std::uint8_t> memory_;
  Global<const std::uint8_t> packed_;
  std::int64_t from_[kOfThread];  // byte of this thread's piece in step 0
  int end_[kOfThread];            // depth at which its row ends, from there on
  int to_;                        // where its first piece goes in stage 0
  int lane_[Shape::kUnitsOfChunk];
};

template <class T, class Shape>
class XRing {
  static constexpr int kRowPieces = Shape::kDepth / kXPiece;
  static constexpr int kColumnsBetween = kFewRowsThreads / kRowPieces;  // a thread's pieces
  static constexpr int kOfThread = 8 * Shape::kTiles / kColumnsBetween;
  static constexpr int kLanePieces = Shape::kMmasOfUnit / 2;
  static_assert(kColumnsBetween % 2 == 0);

  // Where piece p of that column lies in stage 0, in elements.
  __device__ static constexpr int place(int column, int p) {
    return (column * kRowPieces + (p ^ (column & 1) * 5)) * kXPiece;
  }

 public:
  // m columns, 8 kTiles at most; a stage holds no more than these.
  __device__ XRing(Shared<T> memory, Global<const T> x, int m, int k, const FewRowsPlace<Shape>& at)
      : memory_(memory),
        x_(x),
        stage_pitch_(m * Shape::kDepth),
        columns_of_thread_(m - thread_index() / kRowPieces),
        columns_of_lane_(m - at.group) {
    const int column = thread_index() / kRowPieces, p = thread_index() % kRowPieces;
    from_ = std::int64_t{column} * k + p * kXPiece;
    between_ = std::int64_t{kColumnsBetween} * k;
    end_ = k - p * kXPiece;
    to_ = place(column, p);
#pragma unroll
    for (int unit = 0; unit < Shape::kUnitsOfChunk; ++unit) {
#pragma unroll
      for (int i = 0; i < kLanePieces; ++i) {
        lane_[unit][i] =
            place(at.group, at.warp_depth * (kChunk / kXPiece) + unit * (Shape::kUnit / kXPiece) +
                                at.quarter * kLanePieces + i);
      }
    }
  }

  // Starts this thread's copies of the step at that depth; zeros past the end of K.
  __device__ void copy(int stage, int depth) const {
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
      if (i * kColumnsBetween >= columns_of_thread_) break;
      async_copy<16>(memory_, to_ + i * kColumnsBetween * Shape::kDepth + stage * stage_pitch_, x_,
                     from_ + i * between_ + depth, depth < end_);
    }
  }

  // The fragments of a unit for the 8 columns of that tile: those past m are zeros.
  __device__ void load(FragmentB (&b)[Shape::kMmasOfUnit], int stage, int tile, int unit) const {
#pragma unroll
    for (int i = 0; i < kLanePieces; ++i) {
      Vec<std::uint32_t, 4> words{};
      if (tile * 8 < columns_of_lane_) {
        words = std::bit_cast<Vec<std::uint32_t, 4>>(memory_.template load_vec<kXPiece>(
            lane_[unit][i] + tile * 8 * Shape::kDepth + stage * stage_pitch_));
      }
      b[2 * i] = {{words.value[0], words.value[1]}};
      b[2 * i + 1] = {{words.value[2], words.value[3]}};
    }
  }

 private:
  Shared<T> memory_;
  Global<const T> x_;
  int stage_pitch_;
  int columns_of_thread_;  // from its first on
  int columns_of_lane_;
  std::int64_t from_;     // of this thread's first piece, in step 0
  std::int64_t between_;  // to its next
  int end_;
  int to_;
  int lane_[Shape::kUnitsOfChunk][kLanePieces];
};

}  // namespace qlora::cuda
