// The tiled tensor-core products, forward and input gradient: which tile, and the launch.
#include "kernels/linear_tiles.cuh"
#include "launch/linear_paths.h"
#include "launch/linear_tiles.h"
#include "launch/tile_product.h"
#include "launch/tiles.h"

namespace qlora::cuda {
namespace {

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
      const auto arguments = tile_product<T>(p, lora, kShape.rows);
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
