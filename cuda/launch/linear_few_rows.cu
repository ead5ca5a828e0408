// The product for few rows: which shape, how many blocks share the depth, launches.
#include "device/launch.cuh"
#include "kernels/linear_few_rows.cuh"
#include "launch/codebook_factor.h"
#include "launch/linear_few_rows.h"
#include "launch/linear_paths.h"
#include "launch/tiles.h"
#include "qlora_native/dispatch.h"

namespace qlora::cuda {
namespace {

constexpr std::int64_t kMostDepth = std::int64_t{1} << 30;  // depths are 32 bits wide in the kernel

// A unit of 64 where each lies in one block of values: rows of whole units, blocks of whole units.
bool has_wide_units(const Weight4bit& weight) {
  return weight.blocksize >= 64 && weight.cols % 64 == 0;
}

template <class Shape>
constexpr std::int64_t shared_bytes(std::int64_t m) {
  return kFewRowsSharedBytes + Shape::kStages * m * Shape::kDepth * 2;
}

// Static shared memory: the map of double-quantized scales.
constexpr std::int64_t kStaticBytes = 1024;

// fn<Shape>() with the fewest columns that hold m and for which a block's shared memory suffices:
// more columns go with less depth, and so with fewer bytes of x in a stage. False: there are none.
template <int kUnit, class Fn>
bool with_shape(std::int64_t m, Fn&& fn) {
  int largest_shared = 0;
  if (!largest_shared_memory(&largest_shared).ok()) return false;
  const auto try_shape = [&]<int kTiles>() {
    using Shape = FewRowsShape<kTiles, kUnit>;
    if (m > 8 * kTiles || shared_bytes<Shape>(m) + kStaticBytes > largest_shared) return false;
    fn.template operator()<Shape>();
    return true;
  };
  if (try_shape.template operator()<1>() || try_shape.template operator()<2>() ||
      try_shape.template operator()<4>()) {
    return true;
  }
  if constexpr (kUnit == 64) return try_shape.template operator()<8>();
  return false;
}

template <class Fn>
bool with_shape(const Weight4bit& weight, std::int64_t m, Fn&& fn) {
  return has_wide_units(weight) ? with_shape<64>(m, fn) : with_shape<32>(m, fn);
}

// How the depth is shared out.
struct Split {
  std::int64_t splits, steps;
};

// Counted in steps that a multiprocessor streams one after another (8 kB of codes, some 0.3 us on
// an H100). A split pays for a second launch, and for its partial sums, written and read again.
constexpr std::int64_t kSecondLaunch = 8;
constexpr std::int64_t kMostSplits = 16;

template <class Shape>
Split choose_split(std::int64_t row_sets, std::int64_t steps, std::int64_t processors) {
  constexpr std::int64_t kPanel = ScalePanel<Shape>::kSteps;
  constexpr std::int64_t kPartialBytes = Shape::kSums * 16;
  constexpr std::int64_t kStepBytes = Shape::kRows * Shape::kDepth / 2;
  Split best{1, steps};
  std::int64_t least = ceil_div(row_sets, processors) * steps;
  for (std::int64_t splits = 2; splits <= kMostSplits && splits <= steps; ++splits) {
    const std::int64_t share = ceil_div(ceil_div(steps, splits), kPanel) * kPanel;
    if (ceil_div(steps, share) != splits) continue;  // some would have nothing to do
    const std::int64_t turns = ceil_div(row_sets * splits, processors);
    const std::int64_t cost =
        turns * share + kSecondLaunch + ceil_div(turns * 2 * kPartialBytes, kStepBytes);
    if (cost < least) {
      least = cost;
      best = {splits, share};
    }
  }
  return best;
}

FewRowsScales scales_of(const Weight4bit& weight, std::int64_t unit) {
  const std::int64_t values = weight.rows * weight.cols;
  FewRowsScales s{.scales = device_scales(weight.scales, n_blocks(values, weight.blocksize)),
                  .is_double = weight.scales.double_quantized(),
                  .fours = false,
                  .log2_blocksize = log2_of(weight.blocksize),
                  .factor = 1.0f};
  const bool aligned = s.is_double ? s.scales.absmax_q8.aligned(4) : s.scales.absmax.aligned(16);
  s.fours = aligned && weight.blocksize == unit && weight.cols % (4 * unit) == 0;
  return s;
}

template <class Shape, class T>
Status run(const LinearParams& p, const LoraTerm* lora, const Context& context) {
  const Weight4bit& w = p.weight;
  const std::int64_t row_sets = ceil_div(w.rows, Shape::kRows);
  const std::int64_t steps = ceil_div(w.cols, Shape::kDepth);
  int processors = 0;
  if (const Status status = multiprocessors(&processors); !status.ok()) return status;
  const Split split = choose_split<Shape>(row_sets, steps, processors);
  const std::int64_t n_partials = split.splits > 1 ? split.splits * row_sets * Shape::kSums * 4 : 0;
  float* partials = nullptr;
  if (n_partials > 0) {
    partials = static_cast<float*>(
        context.allocate(context.lender, n_partials * static_cast<std::int64_t>(sizeof(float))));
    if (partials == nullptr) {
      return {StatusCode::out_of_memory, "no memory for linear_few_rows' partial sums"};
    }
  }
  const std::int64_t r = lora != nullptr ? lora->r : 0;
  FewRowsArguments<T> a{
      .k = static_cast<int>(w.cols),
      .steps = static_cast<int>(steps),
      .split_steps = static_cast<int>(split.steps),
      .splits = split.splits,
      .x = {static_cast<const T*>(p.x), p.m * w.cols},
      .packed = {w.packed, packed_bytes(w.rows * w.cols)},
      .scales = scales_of(w, Shape::kUnit),
      .r = r,
      .left = {r > 0 ? static_cast<const T*>(lora->left) : nullptr, p.m * r},
      .right = {r > 0 ? static_cast<const T*>(lora->right) : nullptr, w.rows * r},
      .output = {.m = p.m,
                 .n = w.rows,
                 .has_bias = p.bias != nullptr,
                 .bias = {static_cast<const T*>(p.bias), p.bias != nullptr ? w.rows : 0},
                 .out = {static_cast<T*>(p.out), p.m * w.rows}},
      .partials = {partials, n_partials},
      .values = {}};
  a.scales.factor = codebook_factor<T>(w.format);
  for (int i = 0; i < 16; ++i) a.values[i] = w.format.values[i] / a.scales.factor;
  const Status status =
      launch(linear_few_rows_kernel<Shape, T>,
             {.grid = row_sets * split.splits,
              .block = kFewRowsThreads,
              .dynamic_shared = static_cast<std::size_t>(shared_bytes<Shape>(p.m)),
              .stream = context.stream},
             a);
  if (!status.ok() || split.splits == 1) return status;
  return launch(few_rows_sum_kernel<Shape, T>,
                {.grid = ceil_div(row_sets * Shape::kSums, kFewRowsThreads),
                 .block = kFewRowsThreads,
                 .stream = context.stream},
                FewRowsSumArguments<T>{.splits = split.splits,
                                       .row_sets = row_sets,
                                       .partials = {partials, n_partials},
                                       .output = a.output});
}

}  // namespace

bool linear_few_rows_serves(DType dtype, std::int64_t m, const Weight4bit& weight, const void* x) {
  const auto aligned = [](const void* data) {
    return reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
  };
  return dtype != DType::float32 && weight.cols % kCodePiece == 0 && weight.cols <= kMostDepth &&
         aligned(weight.packed) && aligned(x) && with_shape(weight, m, [&]<class>() {});
}

Status linear_few_rows(const LinearParams& p, const LoraTerm* lora, const Context& context) {
  if (p.m == 0 || p.weight.rows == 0) return {};
  Status status;
  const bool serves = linear_few_rows_serves(p.dtype, p.m, p.weight, p.x) &&
                      with_shape(p.weight, p.m, [&]<class Shape>() {
                        status = p.dtype == DType::float16 ? run<Shape, Float16>(p, lora, context)
                                                           : run<Shape, BFloat16>(p, lora, context);
                      });
  if (serves) return status;
  return {StatusCode::unsupported, "linear_few_rows does not serve this case"};
}

}  // namespace qlora::cuda
