#include "kernels/quantize_4bit.cuh"
#include "launch/launchers.h"
#include "launch/tiles.h"
#include "qlora_native/dispatch.h"

namespace qlora::cuda {
namespace {

template <class T>
Quantize4bitArguments<T> arguments_of(const Quantize4bitParams& p) {
  Quantize4bitArguments<T> a{.n = p.n,
                             .log2_blocksize = log2_of(p.blocksize),
                             .x_aligned = false,
                             .packed_aligned = false,
                             .zero_code = p.format.zero_code,
                             .x = {static_cast<const T*>(p.x), p.n},
                             .packed = {p.packed, packed_bytes(p.n)},
                             .absmax = {p.absmax, n_blocks(p.n, p.blocksize)},
                             .order = 0,
                             .midpoints = {},
                             .bins = make_bins(p.format.midpoints)};
  a.x_aligned = a.x.aligned(16);
  a.packed_aligned = a.packed.aligned(4);
  for (int i = 0; i < 16; ++i) a.order |= std::uint64_t{p.format.order[i]} << (4 * i);
  for (int i = 0; i < 15; ++i) a.midpoints[i] = p.format.midpoints[i];
  return a;
}

}  // namespace

Status quantize_4bit(const Quantize4bitParams& p, const Context& context) {
  const bool binned = fit_bins(p.format.midpoints) && codes_ascend(p.format);
  return with_type(p.dtype, [&]<class T>() {
    return with_flag(binned, [&]<bool kBinned>() {
      return with_flag(p.blocksize > kWarpValues, [&]<bool kWide>() {
        return launch_tiles(quantize_4bit_kernel<T, kBinned, kWide>, n_tiles(p.n),
                            arguments_of<T>(p), context.stream);
      });
    });
  });
}

}  // namespace qlora::cuda
