// The quantization functions on every instruction set, against the scalar path: the same bits, at
// every length of a tail and close to every midpoint, and not a byte beside the outputs.
#include <bit>
#include <cstdint>
#include <utility>
#include <vector>

#include "support.h"

namespace {

using namespace qlora;
using namespace qlora::test;

struct Case {
  std::int64_t n;
  std::int64_t blocksize;
  DType dtype;
  Format format;
  bool close = false;  // values close to the midpoints, and no others
};

// Of 16 bits: every finite value, strewn over the blocks. Of 32: midpoints and their neighbours, in
// blocks with absmax 1.
Bytes close_values(const Case& c) {
  std::int64_t i = -1;
  return make_values(c.n, c.dtype, [&] {
    ++i;
    const auto strewn = static_cast<std::uint16_t>(i * 40503);  // odd: a permutation
    if (c.dtype == DType::float16) {
      return (strewn & 0x7C00) == 0x7C00 ? 1.0f : to_float(Float16{strewn});
    }
    if (c.dtype == DType::bfloat16) {
      if ((strewn & 0x7F80) == 0x7F80) return 1.0f;
      const bool below_2 = i < c.n / 2;  // the other half has huge ones in every block
      return to_float(BFloat16{static_cast<std::uint16_t>(below_2 ? strewn & 0xBFFF : strewn)});
    }
    if (i % 32 == 0) return 1.0f;
    const float midpoint = c.format.midpoints[i % 15];
    const auto ulps = static_cast<std::int32_t>(i % 7 % 3 - 1);
    return std::bit_cast<float>(std::bit_cast<std::int32_t>(midpoint) + ulps);
  });
}

// Runs everything once under the instruction set in use; returns all outputs, one behind the other.
Bytes run(const Case& c, const char* isa) {
  const Backend& backend = cpu::backend();
  const Context context;
  Random random;
  const Bytes x = c.close ? close_values(c) : random_values(random, c.n, c.dtype);
  const std::int64_t blocks = n_blocks(c.n, c.blocksize);
  std::vector<Output> outputs;
  const auto keep = [&](Output&& out, const char* op, Status status) {
    if (!status.ok() || !out.intact()) {
      fail("%s %s n=%lld blocksize=%lld: %s", isa, op, number(c.n), number(c.blocksize),
           status.ok() ? "wrote outside its output" : status.message);
    }
    outputs.push_back(std::move(out));
  };

  Output packed(packed_bytes(c.n)), absmax(blocks * 4);
  Status status = backend.quantize_4bit({.format = c.format,
                                         .n = c.n,
                                         .blocksize = c.blocksize,
                                         .dtype = c.dtype,
                                         .x = x.data(),
                                         .packed = packed.as<std::uint8_t>(),
                                         .absmax = absmax.as<float>()},
                                        context);
  // A random weight from here on: every code, and scales that are ordinary numbers.
  Bytes codes(static_cast<std::size_t>(packed_bytes(c.n)));
  for (auto& byte : codes) byte = static_cast<std::uint8_t>(random.bits());
  std::vector<float> scale(static_cast<std::size_t>(blocks));
  for (auto& value : scale) value = static_cast<float>(random.bits() >> 8) * 0x1p-24f;
  keep(std::move(packed), "quantize_4bit packed", status);
  keep(std::move(absmax), "quantize_4bit absmax", status);

  for (const CodeRounding rounding : {CodeRounding::nearest, CodeRounding::bitsandbytes_cpu}) {
    Output q8(c.n), q8_absmax(blocks * 4);
    status = backend.quantize_8bit({.n = c.n,
                                    .blocksize = c.blocksize,
                                    .is_signed = true,
                                    .rounding = rounding,
                                    .dtype = c.dtype,
                                    .x = x.data(),
                                    .codes = q8.as<std::uint8_t>(),
                                    .absmax = q8_absmax.as<float>()},
                                   context);
    Output values(c.n * size_of(c.dtype));
    const Status back = backend.dequantize_8bit({.n = c.n,
                                                 .blocksize = c.blocksize,
                                                 .is_signed = true,
                                                 .codes = q8.as<std::uint8_t>(),
                                                 .absmax = scale.data(),
                                                 .dtype = c.dtype,
                                                 .out = values.as<void>()},
                                                context);
    keep(std::move(q8), "quantize_8bit codes", status);
    keep(std::move(q8_absmax), "quantize_8bit absmax", status);
    keep(std::move(values), "dequantize_8bit", back);
  }

  Output absmax_q8(blocks), nested(ceil_div(blocks, kNestedBlocksize) * 4);
  Output offset(4), decoded(blocks * 4);
  status = backend.quantize_scales({.n = blocks,
                                    .rounding = CodeRounding::nearest,
                                    .absmax = scale.data(),
                                    .absmax_q8 = absmax_q8.as<std::uint8_t>(),
                                    .nested_absmax = nested.as<float>(),
                                    .nested_offset = offset.as<float>()},
                                   context);
  const Scales scales{.absmax_q8 = absmax_q8.as<std::uint8_t>(),
                      .nested_absmax = nested.as<float>(),
                      .nested_offset = offset.as<float>()};
  keep(std::move(decoded), "dequantize_scales",
       backend.dequantize_scales({.n = blocks, .scales = scales, .absmax = decoded.as<float>()},
                                 context));
  Output values(c.n * size_of(c.dtype));
  const Status back = backend.dequantize_4bit({.weight = {.format = c.format,
                                                          .rows = 1,
                                                          .cols = c.n,
                                                          .blocksize = c.blocksize,
                                                          .packed = codes.data(),
                                                          .scales = scales},
                                               .dtype = c.dtype,
                                               .out = values.as<void>()},
                                              context);
  keep(std::move(values), "dequantize_4bit", back);
  keep(std::move(absmax_q8), "quantize_scales codes", status);
  keep(std::move(nested), "quantize_scales nested_absmax", status);
  keep(std::move(offset), "quantize_scales nested_offset", status);

  Bytes all;
  for (const Output& out : outputs) all.insert(all.end(), out.buffer.begin(), out.buffer.end());
  return all;
}

void compare(const Case& c, const char* isa) {
  cpu::force_isa("scalar");
  const Bytes wanted = run(c, "scalar");
  cpu::force_isa(isa);
  if (run(c, isa) != wanted) {
    fail("%s differs from scalar: n=%lld blocksize=%lld", isa, number(c.n), number(c.blocksize));
  }
  count_case();
}

}  // namespace

int main() {
  return on_each_isa([](const char* isa) {
    for (const std::int64_t blocksize : {32, 64, 4096}) {
      for (const DType dtype : kDTypes) {
        for (const Format& format : {kNf4, kFp4}) {
          for (std::int64_t n = 0; n <= 150; ++n) compare({n, blocksize, dtype, format}, isa);
          compare({1 << 16, blocksize, dtype, format, true}, isa);
        }
      }
    }
  });
}
