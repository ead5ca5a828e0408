// The LoRA branch's skinny products (lora_product.cuh says which, and how their depth is cut into
// runs) on the tensor cores, for activations of 16 bits: x and dy, of whole aligned pieces. dA and
// dB are two jobs of one launch, which reads x and dy once.
//
// Exact as fp32: an activation of 16 bits is a tf32 number as it is. What stands across from it,
// fp32 as a rule, is the sum of two, high (rounded) and low (the rest), but for its last bit at
// most; infinity becomes NaN. A product of two tf32 numbers is exact, and the sums of a step of 64
// depths are added up in fp32 of their own, for a tensor core may cut bits off a long one. Two
// products of tf32 cost as much time as four of 16 bits (three parts of bf16, which are as exact,
// would cost three: but fp16 has not the range for parts of a small gradient).
//
// Limiter, counted, not measured: memory at R = 16, issue slots where there is dropout or a larger
// R. 128 rows and 64 depths are 16 kB, which take an H100's multiprocessor 1180 clocks at 3.35
// TB/s, an A100's 1220. Clocks of a multiprocessor for them, by the columns of a tile (R = 64 are
// two tiles, of which the second finds x in the second-level cache):
//
//   columns                                  16      32
//   mma.sync of tf32   A100 (1024 flops)     512    1024
//                      H100 (some 1300)      400     800
//   issue              of u                  690    1030     our reading of sm_90a's loops, no
//                      of dA and dB          800    1230     count; with dropout 900 more
//   shared memory      128 bytes a clock     380     620
//
// Data path: x comes by cp.async into panels (panel.cuh) of a ring of three tiles, one in use, two
// on their way: 32 kB a block, two or three blocks a multiprocessor, where 16 kB hide an H100's
// latency. What stands across is small and out of the second-level cache, of any type and
// alignment: quads (fma_tile.cuh), in registers for a step, then fp32 in one of two buffers. One
// barrier a step.
//
// A warp has 32 rows of the result, all columns. A matrix load, plain or transposed, gives a lane
// two neighbours of the depth in a word, 2t and 2t + 1: they are called t and t + 4 of a product's
// depth, in both operands, whose order of the depth is the same so.
//
// No bank conflicts: the panels', and those of the small operand. Across the depth, [64][columns]:
// element (d, c) at 8 (d / 2 % 4) exclusive-or its place; the lanes of a load have four d / 2 and
// eight c. Along it, [columns][64]: 8 (c % 4); the half of a warp that loads pairs at a time has
// four c and eight d. Vec4s are stored in whole rows, which that permutes within 128 bytes.
#pragma once

#include <cstdint>

#include "device/async_copy.cuh"
#include "device/convert.cuh"
#include "device/matrix.cuh"
#include "device/mma.cuh"
#include "device/shared.cuh"
#include "device/warp.cuh"
#include "kernels/lora_product.cuh"
#include "kernels/panel.cuh"

namespace qlora::cuda {

inline constexpr int kLoraTensorThreads = 128;
inline constexpr int kLoraWarpRows = 32;
inline constexpr int kLoraTensorStep = kPanelColumns;  // of the depth
inline constexpr int kLoraTensorStages = 3;
inline constexpr int kLoraLeftTile = kLoraTileRows * kLoraTensorStep;
static_assert(kLoraTensorThreads / kWarpSize * kLoraWarpRows == kLoraTileRows);

// The activations' panels: a row for each row of the result (u, g), or for each step of the depth
// (dA^T, dB), read transposed.
enum class DepthOfLeft { along_rows, across_rows };

template <class T, class Right>
struct LoraTensorJob {
  std::int64_t rows, cols, depth;
  std::int64_t runs, run_depth;  // whole steps
  RowMajor<T> left;
  Right right;
  DeviceDropout dropout;  // of left, whose rows are m
  bool adds_left;         // beside the product: the sums of left over the depth
  LoraSums sums;          // out
};

template <class T, class Right>
struct LoraTensorArguments {
  LoraTensorJob<T, Right> first;
  std::int64_t first_blocks;
  LoraTensorJob<T, Right> second;
};

// ---- the small operand ----

template <class Right, int kColumns>
struct RightTile {
  static constexpr int kSize = kColumns * kLoraTensorStep;  // of each of two buffers
  static constexpr int kQuads = kSize / kQuad / kLoraTensorThreads;
  static_assert(kQuads >= 1);

  Shared<float> data;

  // Of step d of the depth and column c.
  __device__ static int place(int buffer, int d, int c) {
    const int base = buffer * kSize;
    if constexpr (Right::kAlongDepth) return base + ((c * kLoraTensorStep + d) ^ (c % 4 * 8));
    if constexpr (!Right::kAlongDepth) return base + ((d * kColumns + c) ^ (d / 2 % 4 * 8));
  }

  // The values of (d, c) and (d + 1, c), d even.
  [[nodiscard]] __device__ Vec<float, 2> load_pair(int buffer, int d, int c) const {
    if constexpr (Right::kAlongDepth) return data.template load_vec<2>(place(buffer, d, c));
    if constexpr (!Right::kAlongDepth) {
      return {data.load(place(buffer, d, c)), data.load(place(buffer, d + 1, c))};
    }
  }

  // A step's quads on their way from memory to shared memory.
  struct Fetched {
    Quad quad[kQuads];

    __device__ static int column(int q) {
      const int i = q * kLoraTensorThreads + thread_index();
      return Right::kAlongDepth ? i / (kLoraTensorStep / kQuad) : i % (kColumns / kQuad) * kQuad;
    }
    __device__ static int depth(int q) {
      const int i = q * kLoraTensorThreads + thread_index();
      return Right::kAlongDepth ? i % (kLoraTensorStep / kQuad) * kQuad : i / (kColumns / kQuad);
    }

    __device__ void fetch(const Right& right, std::int64_t first, std::int64_t d,
                          std::int64_t end) {
      if (d >= end) return;
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        quad[q] = right.fetch(first + column(q), d + depth(q), end);
      }
    }

    __device__ void store(const RightTile& tile, int buffer) const {
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        Vec<float, kQuad> values;
#pragma unroll
        for (int i = 0; i < kQuad; ++i) values.value[i] = quad[q].value[i];
        tile.data.store_vec(place(buffer, depth(q), column(q)), values);
      }
    }
  };
};

// ---- the activations ----

// The fragments of 16 rows and 16 of the depth: two products' worth.
struct LeftFragments {
  FragmentA8 half[2];
};

// Word 2h + l of the matrices: row 8l + lane / 4, depths 8h + 2t and the next.
template <class T>
__device__ LeftFragments widen_fragments(const Matrices& m) {
  LeftFragments left;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    FragmentA8& a = left.half[i / 2];
    a.value[i % 2] = widen(T{static_cast<std::uint16_t>(m.word[i])});
    a.value[i % 2 + 2] = widen(T{static_cast<std::uint16_t>(m.word[i] >> 16)});
  }
  return left;
}

// Starts the copies of step `d` of the depth.
template <DepthOfLeft kDepth, class T>
__device__ void copy_left(Shared<T> to, int base, const RowMajor<T>& left, std::int64_t row,
                          std::int64_t d) {
  if constexpr (kDepth == DepthOfLeft::along_rows) {
    copy_panel<kLoraTileRows, kLoraTensorThreads>(to, base, left, row, d);
  } else {
#pragma unroll
    for (int panel = 0; panel < kLoraTileRows / kPanelColumns; ++panel) {
      copy_panel<kLoraTensorStep, kLoraTensorThreads>(
          to, base + panel * kLoraTensorStep * kPanelColumns, left, d, row + panel * kPanelColumns);
    }
  }
}

// The step-th 16 of the tile's depth, of the warp's i-th 16 rows.
template <DepthOfLeft kDepth, class T>
__device__ Matrices load_left(Shared<T> left, int base, int step, int i) {
  const int lane = lane_index();
  const int row = warp_index() * kLoraWarpRows + i * 16;
  if constexpr (kDepth == DepthOfLeft::along_rows) {
    const int own = panel_row(row + lane % 16) ^ (lane / 16 * kPiece);
    return load_matrices(left, (base + own) ^ (step * 16));
  } else {
    const int panel = base + row / kPanelColumns * (kLoraTensorStep * kPanelColumns);
    const int d = step * 16 + lane / 16 * 8 + lane % 8;
    const int column = row % kPanelColumns + lane / 8 % 2 * kPiece;
    return load_matrices_transposed(left, panel + (panel_row(d) ^ column));
  }
}

// ---- a block's shared memory, in bytes ----

inline constexpr int kLoraLeftBytes = 2 * kLoraTensorStages * kLoraLeftTile;
inline constexpr int kLoraKeys = 2 * kLoraTensorStep;  // two buffers

constexpr int lora_right_bytes(int columns) { return 2 * 4 * columns * kLoraTensorStep; }
constexpr int lora_shared_bytes(int columns) {
  return kLoraLeftBytes + lora_right_bytes(columns) +
         kLoraKeys * static_cast<int>(sizeof(DropoutRowKey));
}

// ---- the product ----

template <class T, class Right, DepthOfLeft kDepth, int kColumns>
class LoraTensorTile {
  static constexpr int kAcross = kColumns / 8;
  static constexpr int kDown = kLoraWarpRows / 16;
  using Job = LoraTensorJob<T, Right>;

 public:
  __device__ LoraTensorTile(const Job& job, std::int64_t row, std::int64_t col)
      : job_(job),
        left_(dynamic_shared<T>(0, kLoraTensorStages * kLoraLeftTile)),
        right_{dynamic_shared<float>(kLoraLeftBytes, 2 * RightTile<Right, kColumns>::kSize)},
        step_keys_(
            dynamic_shared<DropoutRowKey>(kLoraLeftBytes + lora_right_bytes(kColumns), kLoraKeys)),
        row_(row),
        col_(col) {}

  // The sums over the depth in [begin, end), into run `run` of the job's.
  __device__ void run(std::int64_t begin, std::int64_t end, std::int64_t run) {
    const auto steps = static_cast<int>(ceil_div(end - begin, kLoraTensorStep));
    const auto depth = [&](int step) { return begin + std::int64_t{step} * kLoraTensorStep; };
    const auto copy = [&](int step) {
      if (step < steps) copy_left<kDepth>(left_, left_base(step), job_.left, row_, depth(step));
      commit_copies();
    };
    typename RightTile<Right, kColumns>::Fetched next;
#pragma unroll
    for (int step = 0; step < kLoraTensorStages - 1; ++step) copy(step);
    next.fetch(job_.right, col_, depth(0), end);
    make_keys_of_lane();
    if (steps > 0) {
      next.store(right_, 0);
      make_keys_of_step(depth(0), 0);
    }
    next.fetch(job_.right, col_, depth(1), end);

#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      wait_copies<kLoraTensorStages - 2>();
      sync_block();  // the step is there, and what the one before read may be overwritten
      copy(step + kLoraTensorStages - 1);
      if (step + 1 < steps) {
        next.store(right_, (step + 1) % 2);
        make_keys_of_step(depth(step + 1), (step + 1) % 2);
      }
      next.fetch(job_.right, col_, depth(step + 2), end);
      add_step(step, depth(step));
    }
    store(run);
  }

 private:
  __device__ static int left_base(int step) { return step % kLoraTensorStages * kLoraLeftTile; }
  // Row of the result, of value `lower` (0: the upper 8 rows, 1: the lower) of fragment i.
  __device__ std::int64_t row_of(int i, int lower) const {
    return row_ + warp_index() * kLoraWarpRows + i * 16 + lower * 8 + lane_index() / 4;
  }

  // ---- dropout ----

  __device__ void make_keys_of_lane() {
    if constexpr (kDepth == DepthOfLeft::along_rows) {
      if (!job_.dropout.active()) return;
#pragma unroll
      for (int i = 0; i < 2 * kDown; ++i) keys_[i] = job_.dropout.row_key(row_of(i / 2, i % 2));
    }
  }

  __device__ void make_keys_of_step(std::int64_t d, int buffer) {
    if (kDepth != DepthOfLeft::across_rows || !job_.dropout.active()) return;
    if (thread_index() < kLoraTensorStep) {
      step_keys_.store(buffer * kLoraTensorStep + thread_index(),
                       job_.dropout.row_key(d + thread_index()));
    }
  }

  // Value v of half h of fragment i, in the step-th 16 of a step that begins at depth d.
  __device__ void drop(LeftFragments& a, int i, int step, std::int64_t d, int buffer) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int second = 0; second < 2; ++second) {
        const int along = step * 16 + h * 8 + lane_index() % 4 * 2 + second;
        DropoutRowKey of_step{};
        if constexpr (kDepth == DepthOfLeft::across_rows) {
          of_step = step_keys_.load(buffer * kLoraTensorStep + along);
        }
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) {
          const bool keeps = kDepth == DepthOfLeft::along_rows
                                 ? job_.dropout.keeps(keys_[2 * i + lower], d + along)
                                 : job_.dropout.keeps(of_step, row_of(i, lower));
          if (!keeps) a.half[h].value[2 * second + lower] = 0.0f;
        }
      }
    }
  }

  // ---- products ----

  __device__ void add_step(int step, std::int64_t d) {
    // Low products apart: on top of the others each would cost a rounding of their sum.
    Accumulator sums[kDown][kAcross] = {}, low_sums[kDown][kAcross] = {};
    float of_left[kDown][2] = {};
#pragma unroll 1
    for (int k = 0; k < kLoraTensorStep / 16; ++k) {
      // Left's fragments stay, right's pass by.
      LeftFragments a[kDown];
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        a[i] = widen_fragments<T>(load_left<kDepth>(left_, left_base(step), k, i));
        if (job_.dropout.active()) drop(a[i], i, k, d, step % 2);
        if (job_.adds_left) {
#pragma unroll
          for (int v = 0; v < 8; ++v) of_left[i][v % 2] += a[i].half[v / 4].value[v % 4];
        }
      }
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const auto pair = right_.load_pair(step % 2, k * 16 + h * 8 + lane_index() % 4 * 2,
                                             j * 8 + lane_index() / 4);
          FragmentB8 high, low;
#pragma unroll
          for (int v = 0; v < 2; ++v) {
            high.value[v] = round_tf32(pair.value[v]);
            low.value[v] = truncate_tf32(pair.value[v] - high.value[v]);
          }
#pragma unroll
          for (int i = 0; i < kDown; ++i) {
            mma_m16n8k8_tf32(low_sums[i][j], a[i].half[h], low);
            mma_m16n8k8_tf32(sums[i][j], a[i].half[h], high);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          sums_[i][j].value[v] += sums[i][j].value[v] + low_sums[i][j].value[v];
        }
      }
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) of_left_[i][lower] += of_left[i][lower];
    }
  }

  __device__ void store(std::int64_t run) {
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int lower = 0; lower < 2; ++lower) {
        const std::int64_t row = row_of(i, lower);
        if (row < job_.rows) {
#pragma unroll
          for (int j = 0; j < kAcross; ++j) {
            const float* pair = sums_[i][j].value + 2 * lower;
            store_pair(run, row, col_ + j * 8 + lane_index() % 4 * 2, pair[0], pair[1]);
          }
        }
        if (!job_.adds_left) continue;
        float sum = of_left_[i][lower];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        if (row < job_.rows && col_ == 0 && lane_index() % 4 == 0) {
          job_.sums.data.store(job_.sums.index(run, row, job_.cols), sum);
        }
      }
    }
  }

  __device__ void store_pair(std::int64_t run, std::int64_t row, std::int64_t col, float first,
                             float second) {
    const LoraSums& sums = job_.sums;
    if (col >= job_.cols) return;
    if (!sums.transposed && job_.cols % 2 == 0) {
      sums.data.template store_vec<2>(sums.index(run, row, col), {first, second});
      return;
    }
    sums.data.store(sums.index(run, row, col), first);
    if (col + 1 < job_.cols) sums.data.store(sums.index(run, row, col + 1), second);
  }

  const Job& job_;
  const Shared<T> left_;
  const RightTile<Right, kColumns> right_;
  const Shared<DropoutRowKey> step_keys_;
  const std::int64_t row_, col_;
  DropoutRowKey keys_[2 * kDown];  // of the lane's rows
  Accumulator sums_[kDown][kAcross] = {};
  float of_left_[kDown][2] = {};
};

// The launcher refuses cards for which the body is left out.
template <class T, class Right, DepthOfLeft kDepth, int kColumns>
__global__ void __launch_bounds__(kLoraTensorThreads, kColumns <= 16 ? 3 : 2)
    lora_tensor_kernel(const __grid_constant__ LoraTensorArguments<T, Right> p) {
  if constexpr (kHasTensorCores16) {
    using Tile = LoraTensorTile<T, Right, kDepth, kColumns>;
    const bool is_first = block_index() < p.first_blocks;
    const LoraTensorJob<T, Right>& job = is_first ? p.first : p.second;
    const std::int64_t block = is_first ? block_index() : block_index() - p.first_blocks;

    // Blocks that read the same rows, for other columns, lie side by side.
    const std::int64_t across = job.cols > 0 ? ceil_div(job.cols, kColumns) : 1;
    const std::int64_t down = ceil_div(job.rows, kLoraTileRows);
    const std::int64_t run = block / across / down;
    const std::int64_t begin = run * job.run_depth;
    const std::int64_t end = begin + job.run_depth < job.depth ? begin + job.run_depth : job.depth;
    Tile(job, block / across % down * kLoraTileRows, block % across * kColumns)
        .run(begin, end, run);
  }
}

}  // namespace qlora::cuda
