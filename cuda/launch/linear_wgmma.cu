// The product on Hopper's warpgroups, forward and input gradient.
#include "kernels/linear_wgmma.cuh"
#include "launch/linear_paths.h"
#include "launch/linear_tiles.h"
#include "launch/linear_wgmma.h"
#include "launch/tile_product.h"

namespace qlora::cuda {
namespace {

template <DepthOfRight kDepth>
Status launch_product(const Product& p, const LoraTerm* lora, const Context& context) {
  if (!wgmma_serves(p.dtype, p.depth, p.weight, p.x)) {
    return {StatusCode::unsupported,
            "the warpgroup product needs an sm_90 card and a build for sm_90a, 16-bit activations, "
            "rows of a multiple of 8 of them and of 32 of the weight's values, and data aligned to "
            "16 bytes"};
  }
  const auto run = [&]<class T>() {
    const auto arguments = tile_product<T>(p, lora, kWgmmaTileRows);
    return launch(linear_wgmma_kernel<T, kDepth>,
                  {.grid = arguments.tiles_down * ceil_div(p.columns, kWgmmaTileColumns),
                   .block = kWgmmaThreads,
                   .dynamic_shared = static_cast<std::size_t>(kWgmmaSharedBytes),
                   .stream = context.stream},
                  arguments);
  };
  return p.dtype == DType::float16 ? run.template operator()<Float16>()
                                   : run.template operator()<BFloat16>();
}

}  // namespace

bool wgmma_serves(DType dtype, std::int64_t depth, const Weight4bit& weight,
                  const void* activations) {
  int number = 0;
  return kBuiltForWarpgroups && architecture(&number).ok() && number == kWarpgroupArchitecture &&
         tiles_serve(dtype, depth, weight, activations);
}

bool wgmma_fills(std::int64_t m, std::int64_t columns) {
  int processors = 0;
  const std::int64_t tiles = ceil_div(m, kWgmmaTileRows) * ceil_div(columns, kWgmmaTileColumns);
  return multiprocessors(&processors).ok() && 2 * tiles >= processors;
}

Status linear_wgmma(const LinearParams& p, const LoraTerm* lora, const Context& context) {
  return launch_product<DepthOfRight::along_rows>(product_of(p), lora, context);
}

Status backward_input_wgmma(const LinearBackwardInputParams& p, const LoraTerm* lora,
                            const Context& context) {
  return launch_product<DepthOfRight::across_rows>(product_of(p), lora, context);
}

}  // namespace qlora::cuda
