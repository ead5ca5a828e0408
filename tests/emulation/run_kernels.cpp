// Runs every kernel on the emulator and prints a digest of all that they wrote, or the first fault:
// what tests/python/test_emulation.py compares a mutant of a kernel with.
#include <cstdint>
#include <vector>

#include "backend.h"
#include "qlora_native/layout.h"
#include "run_hyper.h"
#include "run_orders.h"

namespace {

using namespace qlora;
using namespace emulated_run;

void quantize(const Backend& backend, std::int64_t n, std::int64_t blocksize, const Format& format,
              DType dtype, std::int64_t shift) {
  const Context context;
  const std::int64_t blocks = n_blocks(n, blocksize);
  const Buffer x = values(n, dtype, shift);
  const Buffer packed(packed_bytes(n), 1, shift), absmax(blocks, 4, 0);
  check(backend.quantize_4bit({.format = format,
                               .n = n,
                               .blocksize = blocksize,
                               .dtype = dtype,
                               .x = x.as<void>(),
                               .packed = packed.as<std::uint8_t>(),
                               .absmax = absmax.as<float>()},
                              context));
  const Buffer absmax_q8(blocks, 1, shift), nested(ceil_div(blocks, kNestedBlocksize), 4, 0);
  const Buffer offset(1, 4, 0), decoded(blocks, 4, 0), out(n, size_of(dtype), shift);
  check(backend.quantize_scales({.n = blocks,
                                 .rounding = CodeRounding::nearest,
                                 .absmax = absmax.as<float>(),
                                 .absmax_q8 = absmax_q8.as<std::uint8_t>(),
                                 .nested_absmax = nested.as<float>(),
                                 .nested_offset = offset.as<float>()},
                                context));
  const Scales scales{.absmax_q8 = absmax_q8.as<std::uint8_t>(),
                      .nested_absmax = nested.as<float>(),
                      .nested_offset = offset.as<float>()};
  check(backend.dequantize_scales({.n = blocks, .scales = scales, .absmax = decoded.as<float>()},
                                  context));
  check(backend.dequantize_4bit({.weight = {.format = format,
                                            .rows = 1,
                                            .cols = n,
                                            .blocksize = blocksize,
                                            .packed = packed.as<std::uint8_t>(),
                                            .scales = scales},
                                 .dtype = dtype,
                                 .out = out.as<void>()},
                                context));
  const Buffer codes(n, 1, shift), scale(blocks, 4, 0), back(n, size_of(dtype), shift);
  check(backend.quantize_8bit({.n = n,
                               .blocksize = blocksize,
                               .is_signed = true,
                               .rounding = CodeRounding::nearest,
                               .dtype = dtype,
                               .x = x.as<void>(),
                               .codes = codes.as<std::uint8_t>(),
                               .absmax = scale.as<float>()},
                              context));
  check(backend.dequantize_8bit({.n = n,
                                 .blocksize = blocksize,
                                 .is_signed = true,
                                 .codes = codes.as<std::uint8_t>(),
                                 .absmax = scale.as<float>(),
                                 .dtype = dtype,
                                 .out = back.as<void>()},
                                context));
  for (const Buffer* buffer :
       {&packed, &absmax, &absmax_q8, &nested, &offset, &decoded, &out, &codes, &scale, &back}) {
    buffer->digest();
  }
}

// A step with 32-bit state of n values and of none, then two with 8-bit state.
template <class Hyper, int kMoments>
void step(std::int64_t n, DType dtype, std::int64_t shift, const Hyper& hyper,
          Status (*wide_op)(const StepParams<Hyper, StepTensor<kMoments>>&, const Context&),
          Status (*narrow_op)(const StepParams<Hyper, Step8bitTensor<kMoments>>&, const Context&)) {
  const Context context;
  const std::int64_t blocks = n_blocks(n, kOptimizerBlocksize);
  const Buffer param = values(n, dtype, shift), grad = values(n, dtype, shift);
  StepTensor<kMoments> wide[2] = {{n, dtype, dtype, param.as<void>(), grad.as<void>(), {}},
                                  {0, dtype, dtype, nullptr, nullptr, {}}};
  Step8bitTensor<kMoments> narrow{n, dtype, dtype, param.as<void>(), grad.as<void>(), {}, {}};
  std::vector<Buffer> moments, codes, absmax;
  for (int j = 0; j < kMoments; ++j) {
    wide[0].moments[j] = moments.emplace_back(n, 4, shift).template as<float>();
    narrow.codes[j] = codes.emplace_back(n, 1, shift).template as<std::uint8_t>();
    narrow.absmax[j] = absmax.emplace_back(blocks, 4, 0).template as<float>();
  }
  check(wide_op({.hyper = hyper, .n_tensors = 2, .tensors = wide}, context));
  for (int i = 0; i < 2; ++i) {
    check(narrow_op({.hyper = hyper, .n_tensors = 1, .tensors = &narrow}, context));
  }
  param.digest();
  for (const auto* buffers : {&moments, &codes, &absmax}) {
    for (const Buffer& buffer : *buffers) buffer.digest();
  }
}

void optimizers(const Backend& backend, std::int64_t n, DType dtype, std::int64_t shift) {
  step(n, dtype, shift, kAdamw, backend.adamw_step, backend.adamw_8bit_step);
  step(n, dtype, shift, kLion, backend.lion_step, backend.lion_8bit_step);
  step(n, dtype, shift, kSgd, backend.sgd_step, backend.sgd_8bit_step);
}

}  // namespace

int main() {
  const Backend& backend = cuda::backend();
  print_digests([&] {
    for (const std::int64_t n : {1, 4095, 19 * 4096 + 77}) {
      for (const std::int64_t blocksize : {64, 512, 4096}) {
        quantize(backend, n, blocksize, kNf4, DType::float32, 0);
      }
      quantize(backend, n, 128, kFp4, DType::bfloat16, 3);
      optimizers(backend, n, DType::float32, 0);
      optimizers(backend, n, DType::bfloat16, 3);
    }
  });
}
