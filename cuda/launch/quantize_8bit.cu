// quantize_8bit, and quantize_scales, which is the same on absmax less its mean.
#include "kernels/mean.cuh"
#include "kernels/quantize_8bit.cuh"
#include "launch/launchers.h"
#include "launch/tiles.h"
#include "qlora_native/dispatch.h"

namespace qlora::cuda {
namespace {

template <class T>
Quantize8bitArguments<T> arguments_of(const Quantize8bitParams& p, const float* offset) {
  const bool nearest = p.rounding == CodeRounding::nearest;
  Quantize8bitArguments<T> a{.n = p.n,
                             .log2_blocksize = log2_of(p.blocksize),
                             .x_aligned = false,
                             .codes_aligned = false,
                             .has_offset = offset != nullptr,
                             .smallest_divisor = nearest ? kSmallestDivisor : 0.0f,
                             .x = {static_cast<const T*>(p.x), p.n},
                             .offset = {offset, offset != nullptr ? 1 : 0},
                             .codes = {p.codes, p.n},
                             .absmax = {p.absmax, n_blocks(p.n, p.blocksize)}};
  a.x_aligned = a.x.aligned(16);
  a.codes_aligned = a.codes.aligned(8);
  return a;
}

template <class T, bool kSigned, CodeRounding kRounding>
Status run(const Quantize8bitParams& p, const float* offset, const Context& context) {
  return with_flag(p.blocksize > kWarpValues, [&]<bool kWide>() {
    return launch_tiles(quantize_8bit_kernel<T, kSigned, kRounding, kWide>, n_tiles(p.n),
                        arguments_of<T>(p, offset), context.stream);
  });
}

}  // namespace

Status quantize_8bit(const Quantize8bitParams& p, const Context& context) {
  return with_type(p.dtype, [&]<class T>() {
    return with_flag(p.is_signed, [&]<bool kSigned>() {
      return p.rounding == CodeRounding::nearest
                 ? run<T, kSigned, CodeRounding::nearest>(p, nullptr, context)
                 : run<T, kSigned, CodeRounding::bitsandbytes_cpu>(p, nullptr, context);
    });
  });
}

Status quantize_scales(const QuantizeScalesParams& p, const Context& context) {
  const MeanArguments mean{.n = p.n,
                           .is_given = p.offset != nullptr,
                           .x = {p.absmax, p.n},
                           .given = {p.offset, p.offset != nullptr ? 1 : 0},
                           .mean = {p.nested_offset, 1}};
  const Status status =
      launch(mean_kernel, {.grid = 1, .block = kMeanThreads, .stream = context.stream}, mean);
  if (!status.ok()) return status;
  return p.rounding == CodeRounding::nearest
             ? run<float, true, CodeRounding::nearest>(p.as_8bit(), p.nested_offset, context)
             : run<float, true, CodeRounding::bitsandbytes_cpu>(p.as_8bit(), p.nested_offset,
                                                                context);
}

}  // namespace qlora::cuda
