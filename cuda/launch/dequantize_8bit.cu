// dequantize_8bit, and dequantize_scales, which adds the offset.
#include "kernels/dequantize_8bit.cuh"
#include "launch/launchers.h"
#include "launch/tiles.h"
#include "qlora_native/dispatch.h"

namespace qlora::cuda {
namespace {

template <class T, bool kSigned, bool kOffset>
Status run(const Dequantize8bitParams& p, const float* offset, const Context& context) {
  Dequantize8bitArguments<T> a{.n = p.n,
                               .log2_blocksize = log2_of(p.blocksize),
                               .codes_aligned = false,
                               .out_aligned = false,
                               .codes = {p.codes, p.n},
                               .absmax = {p.absmax, n_blocks(p.n, p.blocksize)},
                               .offset = {offset, kOffset ? 1 : 0},
                               .out = {static_cast<T*>(p.out), p.n}};
  a.codes_aligned = a.codes.aligned(8);
  a.out_aligned = a.out.aligned(16);
  return launch_tiles(dequantize_8bit_kernel<T, kSigned, kOffset>, n_tiles(p.n), a, context.stream);
}

}  // namespace

Status dequantize_8bit(const Dequantize8bitParams& p, const Context& context) {
  return with_type(p.dtype, [&]<class T>() {
    return with_flag(p.is_signed,
                     [&]<bool kSigned>() { return run<T, kSigned, false>(p, nullptr, context); });
  });
}

Status dequantize_scales(const DequantizeScalesParams& p, const Context& context) {
  return run<float, true, true>(p.as_8bit(), p.scales.nested_offset, context);
}

}  // namespace qlora::cuda
