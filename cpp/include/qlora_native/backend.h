// A backend is a table of functions: what the torch layer calls, and all it knows of a device.
#pragma once

#include <cstdint>

#include "qlora_native/params.h"
#include "qlora_native/status.h"

namespace qlora {

// What the caller lends to one call: its thread pool (CPU); its stream, its memory and its matrix
// product (CUDA). A backend keeps none of it past the call.
struct Context {
  using Body = void (*)(void* arg, std::int64_t begin, std::int64_t end);

  // Splits [0, n) into at most `threads` ranges of at least `grain` and runs body(arg, begin, end)
  // on each, from the caller's pool; returns when all are done.
  void (*parallel_for)(std::int64_t n, std::int64_t grain, Body body, void* arg) = nullptr;
  int threads = 1;
  void* stream = nullptr;  // a cudaStream_t, of that device
  int device = 0;

  // Scratch memory of that device, aligned to 64 bytes, from the caller's allocator: the backend's
  // until the op returns, then again the allocator's, for work that follows on the same stream. It
  // holds anything. Null: there is no memory for it.
  void* (*allocate)(void* lender, std::int64_t bytes) = nullptr;
  // The caller's own matrix product on that stream.
  Status (*matmul)(void* lender, const MatmulParams&) = nullptr;
  void* lender = nullptr;  // what those two are called with
};

struct Backend {
  const char* name;  // "cpu-avx2", "cuda", …

  Status (*quantize_4bit)(const Quantize4bitParams&, const Context&);
  Status (*dequantize_4bit)(const Dequantize4bitParams&, const Context&);
  Status (*quantize_8bit)(const Quantize8bitParams&, const Context&);
  Status (*dequantize_8bit)(const Dequantize8bitParams&, const Context&);
  Status (*quantize_scales)(const QuantizeScalesParams&, const Context&);
  Status (*dequantize_scales)(const DequantizeScalesParams&, const Context&);
  Status (*linear_4bit)(const LinearParams&, const Context&);
  Status (*linear_4bit_backward_input)(const LinearBackwardInputParams&, const Context&);
  Status (*qlora_linear)(const QloraLinearParams&, const Context&);
  Status (*qlora_linear_backward)(const QloraLinearBackwardParams&, const Context&);
  Status (*adamw_step)(const AdamwStepParams&, const Context&);
  Status (*adamw_8bit_step)(const Adamw8bitStepParams&, const Context&);
  Status (*lion_step)(const LionStepParams&, const Context&);
  Status (*lion_8bit_step)(const Lion8bitStepParams&, const Context&);
  Status (*sgd_step)(const SgdStepParams&, const Context&);
  Status (*sgd_8bit_step)(const Sgd8bitStepParams&, const Context&);
};

}  // namespace qlora
