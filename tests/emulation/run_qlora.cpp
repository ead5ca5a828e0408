// Runs qlora_linear and its gradients on the emulator, with host memory lent in place of torch's,
// and prints a digest; and once with no memory to lend, which must be an error. The LoRA branch is
// computed on the CUDA cores where activations are no whole aligned pieces, else on the tensor
// cores.
#include <cstdlib>

#include "backend.h"
#include "launch/linear_paths.h"
#include "qlora_native/layout.h"
#include "run_orders.h"

namespace {

using namespace qlora;
using namespace emulated_run;

struct Lender {
  std::vector<void*> held;
  ~Lender() {
    for (void* memory : held) std::free(memory);
  }
  static void* allocate(void* self, std::int64_t bytes) {
    auto& held = static_cast<Lender*>(self)->held;
    held.push_back(std::aligned_alloc(64, static_cast<std::size_t>(ceil_div(bytes, 64) * 64)));
    return held.back();
  }
  static void* refuse(void*, std::int64_t) { return nullptr; }
};

// Activations begin `shift` elements past a 16-byte boundary. `has_memory` false: every call must
// say that there is none.
void run(std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t r, DType dtype, float dropout,
         std::int64_t shift, bool has_memory) {
  Lender lender;
  Context context;
  context.allocate = has_memory ? Lender::allocate : Lender::refuse;
  context.lender = &lender;
  const auto expect = [&](const Status& status) {
    if (has_memory) return check(status);
    if (status.code != StatusCode::out_of_memory) check({StatusCode::device, "took no notice"});
  };
  const Buffer x = values(m * k, dtype, shift), dy = values(m * n, dtype, shift);
  const Buffer a = values(r * k, DType::float32, 0), b = values(n * r, DType::float32, 0);
  const Buffer packed = values(ceil_div(n * k, 8) + 1, DType::float32, 0);
  const Buffer absmax = values(n_blocks(n * k, 64), DType::float32, 0);
  const std::int64_t seed = 7;
  const Weight4bit weight{.format = kNf4,
                          .rows = n,
                          .cols = k,
                          .blocksize = 64,
                          .packed = packed.as<std::uint8_t>(),
                          .scales = {.absmax = absmax.as<float>()}};
  const Lora lora{.r = r,
                  .dtype = DType::float32,
                  .a = a.as<void>(),
                  .b = b.as<void>(),
                  .scale = 1.5f,
                  .dropout_p = dropout,
                  .dropout_seed = &seed};
  const Buffer out(m * n, size_of(dtype), 1), u(m * r, 4, 0), grad_x(m * k, size_of(dtype), 1);
  const Buffer grad_a(r * k, 4, 0), grad_b(n * r, 4, 0), grad_bias(n, size_of(dtype), 0);
  const Backend& backend = cuda::backend();
  expect(backend.qlora_linear({.base = {.m = m,
                                        .weight = weight,
                                        .dtype = dtype,
                                        .x = x.as<void>(),
                                        .bias = nullptr,
                                        .out = out.as<void>()},
                               .lora = lora,
                               .u = u.as<float>()},
                              context));
  expect(backend.qlora_linear_backward({.m = m,
                                        .weight = weight,
                                        .lora = lora,
                                        .dtype = dtype,
                                        .grad_out = dy.as<void>(),
                                        .x = x.as<void>(),
                                        .u = u.as<float>(),
                                        .grad_x = grad_x.as<void>(),
                                        .grad_a = grad_a.as<void>(),
                                        .grad_b = grad_b.as<void>(),
                                        .grad_bias = grad_bias.as<void>()},
                                       context));
  for (const Buffer* buffer : {&out, &u, &grad_x, &grad_a, &grad_b, &grad_bias}) buffer->digest();
}

}  // namespace

int main() {
  cuda::force_way(cuda::Direction::forward, "fma");
  cuda::force_way(cuda::Direction::backward_input, "fma");
  run(9, 24, 32, 8, DType::float32, 0.0f, 1, false);
  print_digests([&] {
    run(9, 70, 136, 8, DType::float32, 0.0f, 1, true);
    run(67, 21, 33, 5, DType::bfloat16, 0.25f, 1, true);
    run(300, 8, 40, 20, DType::float16, 0.0f, 1, true);
    // On the tensor cores: more steps than the ring holds, two runs, a tail of each; two tiles of
    // columns, an odd number of them.
    run(600, 24, 136, 20, DType::bfloat16, 0.25f, 0, true);
    run(70, 40, 72, 67, DType::float16, 0.0f, 0, true);
  });
}
