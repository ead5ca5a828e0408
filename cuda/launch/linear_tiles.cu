// The tiled tensor-core products, forward and input gradient: which tile, and the launch.
#include "kernels/linear_tiles.cuh"
#include "launch/linear_paths.h"
#include "launch/linear_tiles.h"
#include "launch/tiles.h"

namespace qlora::cuda {
namespace {

// What the two directions share: out [M, columns] = x [M, depth] and the weight.
struct Product {
  std::int64_t m;
  std::int64_t depth;
  std::int64_t columns;
  const Weight4bit& weight;
  DType dtype;
  const void* x;
  const void* bias;
  void* out;
};

Product product_of(const LinearParams& p) {
  return {p.m, p.weight.cols, p.weight.rows, p.weight, p.dtype, p.x, p.bias, p.out};
}

Product product_of(const LinearBackwardInputParams& p) {
  return {p.m, p.weight.rows, p.weight.cols, p.weight, p.dtype, p.grad_out, nullptr, p.grad_x};
}

// Before it kernels are empty (kHasTensorCores16).
constexpr int kTilesFromArchitecture = 80;

// ---- which tile ----

// From the largest on, the first that is mostly filled by M rows, fits the card, and of which there
// is one for each multiprocessor; else the last. A tile of 256 rows dequantizes a value for 256
// products, not for 64, and loads a fragment of it for more of them; but a multiprocessor without a
// tile does nothing at all.
constexpr TileShape kShapes[] = {kTile256, kTile128, kTile64};

std::int64_t tiles_down(TileShape shape, const Product& p) { return ceil_div(p.m, shape.rows); }
std::int64_t tiles_across(const Product& p) { return ceil_div(p.columns, kTileColumns); }

Status choose_shape(const Product& p, TileShape* chosen) {
  int processors = 0;
  int shared = 0;
  if (const Status status = multiprocessors(&processors); !status.ok()) return status;
  if (const Status status = largest_shared_memory(&shared); !status.ok()) return status;
  for (const TileShape shape : kShapes) {
    *chosen = shape;
    const bool filled = p.m > shape.rows / 2;
    const bool fits = shape.shared_bytes() + kStaticSharedBytes <= shared;
    if (filled && fits && tiles_down(shape, p) * tiles_across(p) >= processors) break;
  }
  return {};
}

template <class Fn>
Status with_shape(TileShape shape, Fn&& fn) {
  switch (shape.rows) {
    case kTile256.rows:
      return fn.template operator()<kTile256>();
    case kTile128.rows:
      return fn.template operator()<kTile128>();
    default:
      return fn.template operator()<kTile64>();
  }
}

// ---- the launch ----

TileWeight device_weight(const Weight4bit& w) {
  const std::int64_t n = w.rows * w.cols;
  TileWeight weight{.rows = w.rows,
                    .columns = w.cols,
                    .log2_blocksize = log2_of(w.blocksize),
                    .double_quantized = w.scales.double_quantized(),
                    .packed = {w.packed, packed_bytes(n)},
                    .scales = device_scales(w.scales, n_blocks(n, w.blocksize)),
                    .values = {}};
  for (int i = 0; i < 16; ++i) weight.values[i] = w.format.values[i];
  return weight;
}

template <class T>
RowMajor<T> row_major(const void* data, std::int64_t rows, std::int64_t columns) {
  return {{static_cast<const T*>(data), rows * columns}, rows, columns};
}

template <class T>
LinearTilesArguments<T> arguments_of(const Product& p, const LoraTerm* lora, TileShape shape) {
  LinearTilesArguments<T> a{.x = row_major<T>(p.x, p.m, p.depth),
                            .weight = device_weight(p.weight),
                            .out = {.data = {static_cast<T*>(p.out), p.m * p.columns},
                                    .rows = p.m,
                                    .columns = p.columns,
                                    .whole_pieces = p.columns % kPiece == 0},
                            .tiles_down = static_cast<std::uint32_t>(tiles_down(shape, p))};
  a.out.whole_pieces = a.out.whole_pieces && a.out.data.aligned(16);
  if (p.bias != nullptr) {
    a.out.bias = {static_cast<const T*>(p.bias), p.columns};
    a.out.has_bias = true;
  }
  if (lora != nullptr) {
    a.left = row_major<T>(lora->left, p.m, lora->r);
    a.right = row_major<T>(lora->right, p.columns, lora->r);
    if (lora->dropout_p > 0.0f) {
      a.dropout = {.seed = {lora->dropout_seed, 1},
                   .threshold = dropout_threshold(lora->dropout_p),
                   .gain = dropout_gain(lora->dropout_p)};
    }
  }
  return a;
}

template <DepthOfRight kDepth>
Status launch_product(const Product& p, const LoraTerm* lora, const Context& context) {
  if (!tiles_serve(p.dtype, p.depth, p.weight, p.x)) {
    return {StatusCode::unsupported,
            "the tiled product needs sm_80 or later, 16-bit activations, rows of a multiple of 8 "
            "of them and of 32 of the weight's values, and data aligned to 16 bytes"};
  }
  TileShape shape{};
  if (const Status status = choose_shape(p, &shape); !status.ok()) return status;
  const auto run = [&]<class T>() {
    return with_shape(shape, [&]<TileShape kShape>() {
      const auto arguments = arguments_of<T>(p, lora, kShape);
      return launch(linear_tiles_kernel<T, kShape.rows, kDepth>,
                    {.grid = arguments.tiles_down * tiles_across(p),
                     .block = kLinearThreads,
                     .dynamic_shared = static_cast<std::size_t>(kShape.shared_bytes()),
                     .stream = context.stream},
                    arguments);
    });
  };
  return p.dtype == DType::float16 ? run.template operator()<Float16>()
                                   : run.template operator()<BFloat16>();
}

}  // namespace

bool tiles_serve(DType dtype, std::int64_t depth, const Weight4bit& weight,
                 const void* activations) {
  int number = 0;
  return architecture(&number).ok() && number >= kTilesFromArchitecture &&
         dtype != DType::float32 && depth % kPiece == 0 && aligned_to(activations, 16) &&
         weight.cols % kWeightChunk == 0 && aligned_to(weight.packed, 16);
}

Status linear_tiles(const LinearParams& p, const LoraTerm* lora, const Context& context) {
  return launch_product<DepthOfRight::along_rows>(product_of(p), lora, context);
}

Status backward_input_tiles(const LinearBackwardInputParams& p, const LoraTerm* lora,
                            const Context& context) {
  return launch_product<DepthOfRight::across_rows>(product_of(p), lora, context);
}

}  // namespace qlora::cuda
