// Runs linear_few_rows on the emulator and prints a digest of its results, or the first fault: what
// tests/python/test_linear_few_rows.py compares a mutant of the kernel with.
#include <cstdint>
#include <cstring>

#include "launch/linear_few_rows.h"
#include "launch/linear_paths.h"
#include "run_orders.h"
#include "run_weight.h"

namespace {

using namespace emulated_run;

struct Case {
  std::int64_t m, n, k, blocksize;
  bool double_quantized;
  DType dtype;
  std::int64_t r;  // of the LoRA term
};

// Steps and tails of every shape, panels of scales one by one and in fours, a depth that two blocks
// share: with the 2 multiprocessors of the emulator, from 33 steps on.
constexpr Case kCases[] = {
    {5, 40, 1152, 64, true, DType::bfloat16, 16},   {3, 33, 2560, 64, false, DType::bfloat16, 0},
    {12, 70, 1536, 64, true, DType::float16, 32},   {9, 35, 736, 32, false, DType::bfloat16, 0},
    {20, 130, 1024, 128, true, DType::float16, 16}, {2, 9, 16448, 64, true, DType::bfloat16, 16},
    {40, 130, 512, 64, true, DType::bfloat16, 0},
};

// One tensor of scratch memory, as long as the op wants it, that holds NaN.
void* allocate(void* lender, std::int64_t size) {
  auto& memory = *static_cast<std::vector<unsigned char>*>(lender);
  memory.assign(static_cast<std::size_t>(size) + 64, 0xFF);
  return memory.data() + 64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64;
}

void run(const Case& c) {
  const RunWeight weight(c.n, c.k, c.blocksize, c.double_quantized);
  const Buffer x = values(c.m * c.k, c.dtype, 0), bias = values(c.n, c.dtype, 1);
  const Buffer left = values(c.m * c.r, c.dtype, 0), right = values(c.n * c.r, c.dtype, 0);
  const Buffer out(c.m * c.n, size_of(c.dtype), 1);
  std::vector<unsigned char> scratch;
  const Context context{.allocate = allocate, .lender = &scratch};
  const cuda::LoraTerm lora{.r = c.r, .left = left.as<void>(), .right = right.as<void>()};
  check(cuda::linear_few_rows({.m = c.m,
                               .weight = weight.weight(),
                               .dtype = c.dtype,
                               .x = x.as<void>(),
                               .bias = bias.as<void>(),
                               .out = out.as<void>()},
                              c.r > 0 ? &lora : nullptr, context));
  out.digest();
}

}  // namespace

int main() {
  print_digests([&] {
    for (const Case& c : kCases) run(c);
  });
}
