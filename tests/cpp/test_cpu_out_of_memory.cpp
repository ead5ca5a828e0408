// Where memory runs short, qlora_linear and its gradients say so before they write anything: each
// allocation of scratch fails in its turn, until none is left to fail.
#include <cerrno>
#include <cstdlib>
#include <thread>

#include "reference.h"
#include "support.h"

namespace {

int allocations_until_failure = -1;  // negative: none fails

}  // namespace

// The C library's, for the whole program: workspace.cpp takes its memory from here.
extern "C" void* aligned_alloc(std::size_t alignment, std::size_t size) noexcept {
  if (allocations_until_failure == 0) {
    errno = ENOMEM;
    return nullptr;
  }
  if (allocations_until_failure > 0) --allocations_until_failure;
  void* result = nullptr;
  return posix_memalign(&result, alignment, size) == 0 ? result : nullptr;
}

namespace {

using namespace qlora;
using namespace qlora::test;

constexpr std::int64_t kN = 70, kK = 640, kR = 4;

// `run` in a thread of its own, which has kept no scratch of an earlier call, and with three
// threads, so that products differ in what they need.
template <class Run>
void expect_all_or_nothing(const char* isa, const char* op, std::int64_t m,
                           std::vector<Output>& outputs, const Run& run) {
  for (int allowed = 0;; ++allowed) {
    for (Output& output : outputs) output = Output(static_cast<std::int64_t>(output.size));
    const std::vector<Output> before = outputs;
    Status status;
    std::thread([&] {
      allocations_until_failure = allowed;
      status = run(three_threads());
      allocations_until_failure = -1;
    }).join();
    count_case();
    if (status.ok()) {
      if (allowed == 0) fail("%s %s m=%lld takes no scratch", isa, op, number(m));
      return;
    }
    if (status.code != StatusCode::out_of_memory) fail("%s %s: %s", isa, op, status.message);
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      if (outputs[i].buffer == before[i].buffer) continue;
      fail("%s %s m=%lld: output %zu is written although allocation %d failed", isa, op, number(m),
           i, allowed);
    }
  }
}

void check(const char* isa, std::int64_t m) {
  Random random;
  const Bytes packed(static_cast<std::size_t>(packed_bytes(kN * kK)), std::uint8_t{0x5C});
  const Bytes absmax = unit_values(random, n_blocks(kN * kK, 64), DType::float32);
  const Scales scales{.absmax = reinterpret_cast<const float*>(absmax.data())};
  const Weight4bit weight{kNf4, kN, kK, 64, packed.data(), scales};
  const auto values = [&](std::int64_t n) { return unit_values(random, n, DType::float32); };
  const Bytes x = values(m * kK), grad_out = values(m * kN), u = values(m * kR);
  const Bytes a = values(kR * kK), b = values(kN * kR);
  const Lora lora{kR, DType::float32, a.data(), b.data(), /*scale=*/0.5f, 0.0f, nullptr};

  const auto floats = [](std::int64_t n) { return Output(n * size_of(DType::float32)); };
  std::vector<Output> forward = {floats(m * kN), floats(m * kR)};
  expect_all_or_nothing(isa, "qlora_linear", m, forward, [&](const Context& context) {
    return cpu::backend().qlora_linear(
        {{m, weight, DType::float32, x.data(), nullptr, forward[0].as<void>()},
         lora,
         forward[1].as<float>()},
        context);
  });
  std::vector<Output> backward = {floats(m * kK), floats(kR * kK), floats(kN * kR), floats(kN)};
  expect_all_or_nothing(isa, "qlora_linear_backward", m, backward, [&](const Context& context) {
    return cpu::backend().qlora_linear_backward(
        {m, weight, lora, DType::float32, grad_out.data(), x.data(),
         reinterpret_cast<const float*>(u.data()), backward[0].as<void>(), backward[1].as<void>(),
         backward[2].as<void>(), backward[3].as<void>()},
        context);
  });
}

}  // namespace

int main() {
  return on_each_isa([](const char* isa) {
    for (const std::int64_t m : {2, 8, 12, 70}) check(isa, m);
  });
}
