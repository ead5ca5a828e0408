#include "kernels/dequantize_4bit.cuh"
#include "launch/launchers.h"
#include "launch/tiles.h"
#include "qlora_native/dispatch.h"

namespace qlora::cuda {
namespace {

template <class T>
Dequantize4bitArguments<T> arguments_of(const Dequantize4bitParams& p) {
  const std::int64_t n = p.weight.rows * p.weight.cols;
  Dequantize4bitArguments<T> a{
      .n = n,
      .log2_blocksize = log2_of(p.weight.blocksize),
      .packed_aligned = false,
      .out_aligned = false,
      .packed = {p.weight.packed, packed_bytes(n)},
      .scales = device_scales(p.weight.scales, n_blocks(n, p.weight.blocksize)),
      .out = {static_cast<T*>(p.out), n},
      .values = {}};
  a.packed_aligned = a.packed.aligned(4);
  a.out_aligned = a.out.aligned(16);
  for (int i = 0; i < 16; ++i) a.values[i] = p.weight.format.values[i];
  return a;
}

}  // namespace

Status dequantize_4bit(const Dequantize4bitParams& p, const Context& context) {
  return with_type(p.dtype, [&]<class T>() {
    return with_flag(p.weight.scales.double_quantized(), [&]<bool kDouble>() {
      const auto arguments = arguments_of<T>(p);
      return launch_tiles(dequantize_4bit_kernel<T, kDouble>, n_tiles(arguments.n), arguments,
                          context.stream);
    });
  });
}

}  // namespace qlora::cuda
