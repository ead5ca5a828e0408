// Every instruction set against the scalar path, without torch and Python: the same bits from all
// of the quantization functions, at every length of a tail, and not a byte beside the outputs.
//
// Prints which instruction sets ran; the exit status is the number of failed checks, at most 99.
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "isa.h"
#include "qlora_native/layout.h"
#include "qlora_native/params.h"

namespace {

using namespace qlora;
using Bytes = std::vector<std::uint8_t>;

constexpr std::size_t kMargin = 64;
constexpr std::uint8_t kSentinel = 0xA5;
int failures = 0;

// An output in the middle of a guarded buffer.
struct Output {
  Bytes buffer;
  std::size_t size;

  explicit Output(std::int64_t bytes)
      : buffer(static_cast<std::size_t>(bytes) + 2 * kMargin, kSentinel),
        size(static_cast<std::size_t>(bytes)) {}

  template <class T>
  T* as() {
    return reinterpret_cast<T*>(buffer.data() + kMargin);
  }
  [[nodiscard]] bool intact() const {
    for (std::size_t i = 0; i < kMargin; ++i) {
      if (buffer[i] != kSentinel || buffer[kMargin + size + i] != kSentinel) return false;
    }
    return true;
  }
};

// xorshift32: the same values on every platform.
struct Random {
  std::uint32_t state = 2463534242u;

  std::uint32_t bits() {
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return state;
  }
  // Over all magnitudes; one in 64 is infinite, NaN, subnormal or zero.
  float value() {
    const std::uint32_t chosen = bits() % 256;
    if (chosen == 0) return std::bit_cast<float>(0x7F800000u | (bits() & 0x80000000u));
    if (chosen == 1) return std::bit_cast<float>(0x7FC00000u);
    if (chosen == 2) return std::bit_cast<float>(bits() & 0x807FFFFFu);
    if (chosen == 3) return 0.0f;
    const float unit = static_cast<float>(bits() >> 8) * 0x1p-23f - 1.0f;
    return unit * std::bit_cast<float>(((bits() % 40) + 100) << 23);
  }
};

Bytes random_values(Random& random, std::int64_t n, DType dtype) {
  Bytes bytes(static_cast<std::size_t>(n * size_of(dtype)));
  for (std::int64_t i = 0; i < n; ++i) {
    const float value = random.value();
    std::uint8_t* const at = bytes.data() + i * size_of(dtype);
    if (dtype == DType::float32) {
      std::memcpy(at, &value, sizeof value);
    } else {
      const std::uint16_t bits = dtype == DType::float16 ? from_float<Float16>(value).bits
                                                         : from_float<BFloat16>(value).bits;
      std::memcpy(at, &bits, sizeof bits);
    }
  }
  return bytes;
}

struct Case {
  std::int64_t n;
  std::int64_t blocksize;
  DType dtype;
  Format format;
};

// Runs everything once under the instruction set in use; returns all outputs, one behind the other.
Bytes run(const Case& c, const char* isa) {
  const Backend& backend = cpu::backend();
  const Context context;
  Random random;
  const Bytes x = random_values(random, c.n, c.dtype);
  const std::int64_t blocks = n_blocks(c.n, c.blocksize);
  std::vector<Output> outputs;
  const auto keep = [&](Output&& out, const char* op, Status status) {
    if (!status.ok() || !out.intact()) {
      std::printf("%s %s n=%lld blocksize=%lld: %s\n", isa, op, static_cast<long long>(c.n),
                  static_cast<long long>(c.blocksize),
                  status.ok() ? "wrote outside its output" : status.message);
      ++failures;
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

}  // namespace

int main() {
  for (int i = 0; cpu::available_isa(i) != nullptr; ++i) {
    const std::string isa = cpu::available_isa(i);
    int cases = 0;
    for (const std::int64_t blocksize : {32, 64, 4096}) {
      for (std::int64_t n = 0; n <= 150; ++n) {
        for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
          for (const Format& format : {kNf4, kFp4}) {
            const Case c{n, blocksize, dtype, format};
            cpu::force_isa("scalar");
            const Bytes wanted = run(c, "scalar");
            cpu::force_isa(isa.c_str());
            if (run(c, isa.c_str()) != wanted) {
              std::printf("%s differs from scalar: n=%lld blocksize=%lld\n", isa.c_str(),
                          static_cast<long long>(n), static_cast<long long>(blocksize));
              ++failures;
            }
            ++cases;
          }
        }
      }
    }
    std::printf("%s: %d cases\n", isa.c_str(), cases);
  }
  std::printf("%d failures\n", failures);
  return failures < 99 ? failures : 99;
}
