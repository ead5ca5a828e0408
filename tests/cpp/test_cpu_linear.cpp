// The linear ops on every instruction set, against fp64 on the same dequantized weight, at odd
// sizes: no element may be off by more than its additions in fp32 can be. Also the same bits with
// one thread and with three, and not a byte beside the outputs.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "qlora_native/dropout.h"
#include "reference.h"
#include "support.h"

namespace {

using namespace qlora;
using namespace qlora::test;

struct Case {
  std::int64_t m, n, k, r, blocksize;
  bool double_quantized;
  float dropout_p;
};

// What the sizes are for: a row each of the matrix-vector kernel (few rows) and the packed product,
// with K whole words of codes (a multiple of 16) or not, and N past a vector, a panel, a block.
constexpr Case kCases[] = {
    {0, 5, 32, 2, 32, false, 0.0f},      {3, 0, 32, 2, 32, false, 0.0f},
    {1, 1, 1, 1, 32, false, 0.0f},       {1, 37, 75, 6, 64, true, 0.25f},
    {1, 21, 1040, 16, 64, true, 0.0f},   {2, 19, 48, 3, 32, false, 0.25f},
    {3, 33, 272, 17, 128, true, 0.25f},  {4, 23, 656, 5, 4096, true, 0.0f},
    {5, 37, 75, 6, 64, true, 0.25f},     {7, 23, 832, 5, 64, true, 0.25f},
    {6, 300, 64, 20, 4096, false, 0.0f}, {17, 130, 176, 8, 64, true, 0.25f},
    {530, 9, 32, 2, 32, true, 0.25f},    {61, 83, 437, 16, 128, true, 0.0f},
};

// Everything an op is given.
struct Inputs {
  Case c;
  DType dtype, lora_dtype;
  Bytes packed, absmax, absmax_q8, nested_absmax, nested_offset;
  Bytes x, bias, grad_out, a, b, u;
  std::int64_t seed = 11;

  Inputs(const Case& c, DType dtype, DType lora_dtype)
      : c(c), dtype(dtype), lora_dtype(lora_dtype) {
    Random random;
    const std::int64_t values = c.n * c.k, blocks = n_blocks(values, c.blocksize);
    const auto bytes = [&](std::int64_t n) {
      Bytes result(static_cast<std::size_t>(n));
      for (auto& byte : result) byte = static_cast<std::uint8_t>(random.bits() >> 24);
      return result;
    };
    packed = bytes(packed_bytes(values));
    absmax = unit_values(random, blocks, DType::float32);
    absmax_q8 = bytes(blocks);
    nested_absmax = unit_values(random, ceil_div(blocks, kNestedBlocksize), DType::float32);
    nested_offset = unit_values(random, 1, DType::float32);
    x = unit_values(random, c.m * c.k, dtype);
    bias = unit_values(random, c.n, dtype);
    grad_out = unit_values(random, c.m * c.n, dtype);
    a = unit_values(random, c.r * c.k, lora_dtype);
    b = unit_values(random, c.n * c.r, lora_dtype);
    u = unit_values(random, c.m * c.r, DType::float32);
  }

  [[nodiscard]] Weight4bit weight() const {
    const auto floats = [](const Bytes& v) { return reinterpret_cast<const float*>(v.data()); };
    const Scales plain{.absmax = floats(absmax)};
    const Scales nested{.absmax_q8 = absmax_q8.data(),
                        .nested_absmax = floats(nested_absmax),
                        .nested_offset = floats(nested_offset)};
    return {kNf4, c.n, c.k, c.blocksize, packed.data(), c.double_quantized ? nested : plain};
  }
  [[nodiscard]] Lora lora() const {
    const bool drops = c.dropout_p > 0.0f;
    return {
        c.r, lora_dtype, a.data(), b.data(), /*scale=*/0.75f, c.dropout_p, drops ? &seed : nullptr};
  }
  [[nodiscard]] LinearParams linear(void* out) const {
    return {c.m, weight(), dtype, x.data(), bias.data(), out};
  }
};

// What the ops wrote, in the order of kOutputs.
using Results = std::vector<Output>;
enum Which { kOut, kGradInput, kQloraOut, kU, kGradX, kGradA, kGradB, kGradBias, kOutputs };
constexpr const char* kNames[kOutputs] = {"linear_4bit out",  "linear_4bit_backward_input grad_x",
                                          "qlora_linear out", "qlora_linear u",
                                          "qlora grad_x",     "qlora grad_a",
                                          "qlora grad_b",     "qlora grad_bias"};

DType dtype_of(const Inputs& in, int which) {
  if (which == kU) return DType::float32;
  return which == kGradA || which == kGradB ? in.lora_dtype : in.dtype;
}

Results run(const Inputs& in, const Context& context) {
  const Backend& backend = cpu::backend();
  const Case& c = in.c;
  const std::int64_t sizes[kOutputs] = {c.m * c.n, c.m * c.k, c.m * c.n, c.m * c.r,
                                        c.m * c.k, c.r * c.k, c.n * c.r, c.n};
  Results results;
  for (int i = 0; i < kOutputs; ++i) results.emplace_back(sizes[i] * size_of(dtype_of(in, i)));
  const auto at = [&](int which) { return results[static_cast<std::size_t>(which)].as<void>(); };
  const auto expect = [](const char* op, Status status) {
    if (!status.ok()) fail("%s: %s", op, status.message);
  };
  expect("linear_4bit", backend.linear_4bit(in.linear(at(kOut)), context));
  expect("linear_4bit_backward_input",
         backend.linear_4bit_backward_input(
             {c.m, in.weight(), in.dtype, in.grad_out.data(), at(kGradInput)}, context));
  expect("qlora_linear",
         backend.qlora_linear({in.linear(at(kQloraOut)), in.lora(), static_cast<float*>(at(kU))},
                              context));
  expect("qlora_linear_backward",
         backend.qlora_linear_backward({c.m, in.weight(), in.lora(), in.dtype, in.grad_out.data(),
                                        in.x.data(), reinterpret_cast<const float*>(in.u.data()),
                                        at(kGradX), at(kGradA), at(kGradB), at(kGradBias)},
                                       context));
  return results;
}

// The same in fp64.
std::vector<Matrix> reference(const Inputs& in) {
  const Case& c = in.c;
  Bytes values(static_cast<std::size_t>(c.n * c.k * size_of(DType::float32)));
  cpu::force_isa("scalar");
  if (!cpu::backend()
           .dequantize_4bit({in.weight(), DType::float32, values.data()}, Context{})
           .ok()) {
    fail("dequantize_4bit failed");
  }
  const Lora lora = in.lora();
  const auto dropped = [&](Matrix m) {
    if (c.dropout_p == 0.0f) return m;
    for (std::int64_t i = 0; i < m.rows; ++i) {
      const DropoutRowKey key = dropout_row_key(static_cast<std::uint64_t>(in.seed), i);
      for (std::int64_t j = 0; j < m.cols; ++j) {
        const auto column = static_cast<std::uint32_t>(j);
        if (!dropout_keeps(key, column, dropout_threshold(c.dropout_p))) m.at(i, j) = {};
      }
    }
    return static_cast<double>(dropout_gain(c.dropout_p)) * m;
  };
  const Matrix w(values, DType::float32, c.n, c.k);
  const Matrix x(in.x, in.dtype, c.m, c.k), grad_out(in.grad_out, in.dtype, c.m, c.n);
  const Matrix a(in.a, in.lora_dtype, c.r, c.k), b(in.b, in.lora_dtype, c.n, c.r);
  const Matrix saved_u(in.u, DType::float32, c.m, c.r);
  const Matrix one_bias(in.bias, in.dtype, 1, c.n);
  Matrix ones(c.m, 1);
  for (Sum& one : ones.sums) one = {1.0, 1.0};
  const Matrix bias = ones * one_bias;

  const Matrix base = x * transposed(w) + bias;
  const Matrix base_grad = grad_out * w;
  const Matrix u = dropped(x) * transposed(a);
  const Matrix g = lora.scale * (grad_out * b);
  return {base,
          base_grad,
          base + lora.scale * (u * transposed(b)),
          u,
          base_grad + dropped(g * a),
          transposed(g) * dropped(x),
          lora.scale * (transposed(grad_out) * saved_u),
          transposed(ones) * grad_out};
}

// Half a unit in the last place, relative.
double rounding(DType dtype) {
  if (dtype == DType::float32) return 0x1p-24;
  return dtype == DType::float16 ? 0x1p-11 : 0x1p-8;
}

void check(const Inputs& in, const char* isa, int which, const Output& got, const Matrix& wanted) {
  const Case& c = in.c;
  const DType dtype = dtype_of(in, which);
  // Each term of the longest chain of sums, and a few more for factors.
  const double additions = static_cast<double>(c.m + c.n + c.k + c.r + 16);
  // Paths with bf16 pair products round the weight to bf16.
  const bool pairs = std::strstr(isa, "bf16") != nullptr && in.dtype == DType::bfloat16;
  const double relative = additions * 0x1p-24 + (pairs ? 0x1p-8 : 0.0);
  for (std::size_t i = 0; i < wanted.sums.size(); ++i) {
    const Sum& sum = wanted.sums[i];
    const double value = get(got.data() + i * static_cast<std::size_t>(size_of(dtype)), dtype);
    const double allowed =
        relative * sum.magnitude + rounding(dtype) * std::fabs(sum.value) + 0x1p-25;
    if (std::fabs(value - sum.value) <= allowed) continue;
    fail("%s %s m=%lld n=%lld k=%lld r=%lld, element %zu: %g instead of %g (+- %g)", isa,
         kNames[which], number(c.m), number(c.n), number(c.k), number(c.r), i, value, sum.value,
         allowed);
    return;
  }
}

}  // namespace

int main() {
  return on_each_isa([](const char* isa) {
    for (const Case& c : kCases) {
      for (const DType dtype : kDTypes) {
        const Inputs in(c, dtype, c.r % 2 == 0 ? DType::float32 : dtype);
        const std::vector<Matrix> wanted = reference(in);
        cpu::force_isa(isa);
        const Results one = run(in, Context{}), three = run(in, three_threads());
        for (int i = 0; i < kOutputs; ++i) {
          const auto at = static_cast<std::size_t>(i);
          check(in, isa, i, one[at], wanted[at]);
          if (!one[at].intact()) fail("%s %s wrote outside its output", isa, kNames[i]);
          if (one[at].buffer != three[at].buffer) {
            fail("%s %s m=%lld: other bits with three threads", isa, kNames[i], number(c.m));
          }
        }
        count_case();
      }
    }
  });
}
