// The scales of a block's rows for the next steps, decoded, in shared memory: 1024 of them (4 kB).
//
// A thread takes four consecutive units of a row; those of a row lie side by side, so that for 32
// rows a panel is whole sectors of 32 bytes even where a scale is a byte. It loads them into
// registers while the steps before are multiplied, and decodes and stores them when all warps have
// read the panel's last: value = map[code] * nested + offset as in scales.cuh, or the fp32 itself.
//
// Banks: a row's groups of four are exchanged by the number of its line of 128 bytes, so
// that both a store of four by a quarter of a warp and a load of one unit of eight rows by a warp
// fill each bank at most once.
#pragma once

#include <bit>
#include <cstdint>

#include "device/global.cuh"
#include "device/shared.cuh"
#include "kernels/few_rows_shape.cuh"
#include "kernels/scales.cuh"

namespace qlora::cuda {

inline constexpr int kPanelScales = 1024;
inline constexpr int kPanelBytes = kPanelScales * 4;

struct FewRowsScales {
  DeviceScales scales;
  bool is_double;
  // Whether four consecutive units, from a multiple of four on, are four consecutive scales that
  // one access may load.
  bool fours;
  int log2_blocksize;
  float factor;  // what the codebook was divided by (launch/codebook_factor.h)
};

template <class Shape>
class ScalePanel {
  static constexpr int kUnits = kPanelScales / Shape::kRows;  // of a row
  static constexpr int kFours = kUnits / 4;
  static_assert(Shape::kRows * kFours == kFewRowsThreads);

 public:
  static constexpr int kSteps = kUnits * Shape::kUnit / Shape::kDepth;

  // Scales from depth `end` on are not needed: what stands for them is finite, and meets zeros of
  // x.
  __device__ ScalePanel(Shared<float> memory, const FewRowsScales& from, std::int64_t n, int k,
                        std::int64_t first_row, int end, const FewRowsPlace<Shape>& at)
      : memory_(memory), from_(from) {
    const std::int64_t row = first_row + thread_index() / kFours;
    first_ = row * k;
    end_ = row >= n ? 0 : end < k ? end : k;
    lane_ = at.warp_row * (kRowTiles * 16 * kUnits) + at.group * kUnits;
    lane_exchange_ = exchange(at.group);
    lane_unit_ = at.warp_depth * Shape::kUnitsOfChunk;
  }

  // Asks for this thread's four of the panel that begins at that depth.
  __device__ void fetch(int panel_depth) {
    const int depth = panel_depth + thread_index() % kFours * (4 * Shape::kUnit);
    const auto block = [&](int i) {
      return (first_ + (depth + i * Shape::kUnit)) >> from_.log2_blocksize;
    };
    codes_ = 0;
    factor_ = {};
    if (from_.fours) {
      if (depth >= end_) return;
      if (from_.is_double) {
        codes_ =
            std::bit_cast<std::uint32_t>(from_.scales.absmax_q8.template load_vec<4>(block(0)));
        const float nested = from_.scales.nested_absmax.load(block(0) / kNestedBlocksize);
        factor_ = {{nested, nested, nested, nested}};
      } else {
        factor_ = from_.scales.absmax.template load_vec<4>(block(0));
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (depth + i * Shape::kUnit >= end_) break;
      if (from_.is_double) {
        codes_ |= std::uint32_t{from_.scales.absmax_q8.load(block(i))} << (8 * i);
        factor_.value[i] = from_.scales.nested_absmax.load(block(i) / kNestedBlocksize);
      } else {
        factor_.value[i] = from_.scales.absmax.load(block(i));
      }
    }
  }

  // Stores what was fetched. No thread may still read the panel before.
  __device__ void store(DynamicMap& map, float offset) const {
    Vec<float, 4> scales = factor_;
    if (from_.is_double) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float scaled =
            map.load(static_cast<int>(codes_ >> (8 * i) & 0xFFu)) * factor_.value[i];
        scales.value[i] = scaled + offset;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) scales.value[i] *= from_.factor;
    const int row = thread_index() / kFours, first = thread_index() % kFours * 4;
    memory_.template store_vec<4>(row * kUnits + (first ^ exchange(row)), scales);
  }

  // Of that unit of the lane's chunk in that step, in the lane's row of the warp's `eight`-th
  // eight.
  [[nodiscard]] __device__ float load(int step_of_panel, int unit, int eight) const {
    const int column =
        step_of_panel * (Shape::kDepthWarps * Shape::kUnitsOfChunk) + lane_unit_ + unit;
    return memory_.load(lane_ + (column ^ lane_exchange_) + eight * (8 * kUnits));
  }

 private:
  // What a row's units are exchanged by; rows that are eight apart have the same.
  __device__ static constexpr int exchange(int row) {
    constexpr int kRowsOfLine = kWarpSize / kUnits;
    return row / kRowsOfLine % kFours * 4;
  }

  Shared<float> memory_;
  const FewRowsScales& from_;
  std::int64_t first_;  // value of the row
  int end_;             // depth
  int lane_, lane_exchange_, lane_unit_;
  std::uint32_t codes_ = 0;
  Vec<float, 4> factor_{};  // absmax, or the nested one
};

}  // namespace qlora::cuda
