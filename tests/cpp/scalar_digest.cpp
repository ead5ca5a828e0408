// Runs every op of the CPU backend on made-up numbers, on one thread, and prints a digest of what
// each one wrote. tests/python/test_other_architectures.py builds it for two processors and
// compares.
#include <cstdint>
#include <cstdio>
#include <vector>

#include "isa.h"
#include "qlora_native/format.h"
#include "qlora_native/layout.h"

namespace {

using namespace qlora;

constexpr std::int64_t kM = 5, kN = 37, kK = 75, kR = 6;
constexpr std::int64_t kBlocksize = 64;
constexpr std::int64_t kValues = kN * kK;
constexpr std::int64_t kBlocks = n_blocks(kValues, kBlocksize);

// A linear congruential generator (Knuth, MMIX): the same numbers everywhere, about uniform in ±1.
class Numbers {
 public:
  float next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(static_cast<std::int32_t>(state_ >> 32)) * 0x1p-31f;
  }

  std::vector<float> floats(std::int64_t n) {
    std::vector<float> values(static_cast<std::size_t>(n));
    for (float& value : values) value = next();
    return values;
  }

  std::vector<BFloat16> bfloats(std::int64_t n) {
    std::vector<BFloat16> values(static_cast<std::size_t>(n));
    for (BFloat16& value : values) value = from_float<BFloat16>(next());
    return values;
  }

 private:
  std::uint64_t state_ = 42;
};

void run_serially(std::int64_t n, std::int64_t, Context::Body body, void* arg) {
  if (n > 0) body(arg, 0, n);
}

const Context kContext{.parallel_for = run_serially, .threads = 1, .stream = nullptr};

// FNV-1a over the bytes.
template <class T>
void print(const char* name, const std::vector<T>& values) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
  std::uint64_t hash = 14695981039346656037u;
  for (std::size_t i = 0; i < values.size() * sizeof(T); ++i) {
    hash = (hash ^ bytes[i]) * 1099511628211u;
  }
  std::printf("%s %016llx\n", name, static_cast<unsigned long long>(hash));
}

int failures = 0;

void expect(const char* name, Status status) {
  if (status.ok()) return;
  std::printf("%s failed: %s\n", name, status.message);
  ++failures;
}

template <class T>
std::vector<T> buffer(std::int64_t n) {
  return std::vector<T>(static_cast<std::size_t>(n));
}

void run(const Backend& backend) {
  Numbers numbers;
  const std::vector<float> dense = numbers.floats(kValues);
  auto packed = buffer<std::uint8_t>(packed_bytes(kValues));
  auto absmax = buffer<float>(kBlocks);
  expect("quantize_4bit", backend.quantize_4bit({kNf4, kValues, kBlocksize, DType::float32,
                                                 dense.data(), packed.data(), absmax.data()},
                                                kContext));
  print("packed", packed);
  print("absmax", absmax);

  auto absmax_q8 = buffer<std::uint8_t>(kBlocks);
  auto nested_absmax = buffer<float>(ceil_div(kBlocks, kNestedBlocksize));
  auto nested_offset = buffer<float>(1);
  QuantizeScalesParams scales{};
  scales.n = kBlocks;
  scales.rounding = CodeRounding::nearest;
  scales.absmax = absmax.data();
  scales.absmax_q8 = absmax_q8.data();
  scales.nested_absmax = nested_absmax.data();
  scales.nested_offset = nested_offset.data();
  expect("quantize_scales", backend.quantize_scales(scales, kContext));
  print("absmax_q8", absmax_q8);
  print("nested_offset", nested_offset);

  const Weight4bit weight{kNf4,
                          kN,
                          kK,
                          kBlocksize,
                          packed.data(),
                          {nullptr, absmax_q8.data(), nested_absmax.data(), nested_offset.data()}};
  auto restored = buffer<BFloat16>(kValues);
  expect("dequantize_4bit",
         backend.dequantize_4bit({weight, DType::bfloat16, restored.data()}, kContext));
  print("restored", restored);

  auto codes = buffer<std::uint8_t>(kValues);
  auto absmax_8bit = buffer<float>(n_blocks(kValues, 256));
  expect("quantize_8bit",
         backend.quantize_8bit({kValues, 256, true, CodeRounding::nearest, DType::float32,
                                dense.data(), codes.data(), absmax_8bit.data()},
                               kContext));
  print("codes", codes);

  const std::vector<BFloat16> x = numbers.bfloats(kM * kK);
  const std::vector<BFloat16> grad_out = numbers.bfloats(kM * kN);
  const std::vector<float> a = numbers.floats(kR * kK);
  const std::vector<float> b = numbers.floats(kN * kR);
  const std::int64_t seed = 7;
  const Lora lora{kR, DType::float32, a.data(), b.data(), 0.5f, 0.1f, &seed};
  auto out = buffer<BFloat16>(kM * kN);
  auto u = buffer<float>(kM * kR);
  expect("qlora_linear",
         backend.qlora_linear(
             {{kM, weight, DType::bfloat16, x.data(), nullptr, out.data()}, lora, u.data()},
             kContext));
  print("out", out);
  print("u", u);

  auto grad_x = buffer<BFloat16>(kM * kK);
  auto grad_a = buffer<float>(kR * kK);
  auto grad_b = buffer<float>(kN * kR);
  auto grad_bias = buffer<BFloat16>(kN);
  expect("qlora_linear_backward",
         backend.qlora_linear_backward(
             {kM, weight, lora, DType::bfloat16, grad_out.data(), x.data(), u.data(), grad_x.data(),
              grad_a.data(), grad_b.data(), grad_bias.data()},
             kContext));
  print("grad_x", grad_x);
  print("grad_a", grad_a);
  print("grad_b", grad_b);
  print("grad_bias", grad_bias);

  std::vector<float> param = numbers.floats(kValues);
  auto exp_avg = buffer<float>(kValues);
  auto exp_avg_sq = buffer<float>(kValues);
  const AdamwTensor tensor{kValues,      DType::float32, DType::float32,
                           param.data(), dense.data(),   {exp_avg.data(), exp_avg_sq.data()}};
  const AdamwHyper hyper{1e-3, 0.9, 0.999, 1e-8, 0.01, 1, false, nullptr, nullptr};
  expect("adamw_step", backend.adamw_step({hyper, 1, &tensor}, kContext));
  print("param", param);
}

}  // namespace

int main() {
  qlora::cpu::force_isa("scalar");
  run(qlora::cpu::backend());
  return failures;
}
