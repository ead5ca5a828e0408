// The ways in which a product with a 4-bit weight can be computed, and which one is taken.
//
// Every way computes the same: y = x W^T (+ bias) (+ left right^T), or grad_x = grad_out W (+ the
// LoRA product, masked). linear_paths.cu has the list of those that are built, what each can serve,
// and the table that chooses among them.
#pragma once

#include <cstdint>
#include <span>

#include "qlora_native/backend.h"
#include "qlora_native/linear_choice.h"

namespace qlora::cuda {

// The LoRA branch's second product: r more steps in the depth of the base product, on the same
// accumulators. Both matrices are of the activations' type, in the workspace, aligned to 64 bytes.
// For 16-bit activations r is two or three times the rank, for the operands are split into a high
// and a low half (kernels/lora_sums.cuh); it is a multiple of 16, the rest being zeros.
//
//   forward          left [M, r] = scale * u     right [N, r] = B       no dropout: it is in u
//   input gradient   left [M, r] = scale * dy B  right [K, r] = A^T     the mask and the gain
//                    multiply the product left right^T alone, at [m, k]: LoRA's steps come first,
//                    then the accumulators are masked, then dy W goes on top
struct LoraTerm {
  std::int64_t r;
  const void* left;
  const void* right;
  float dropout_p = 0.0f;
  const std::int64_t* dropout_seed = nullptr;  // [1] on the device; null where dropout_p is 0
};

// ---- the ways, forward; lora may be null ----

Status linear_few_rows(const LinearParams& p, const LoraTerm* lora, const Context& context);
Status linear_tiles(const LinearParams& p, const LoraTerm* lora, const Context& context);
Status linear_wgmma(const LinearParams& p, const LoraTerm* lora, const Context& context);
Status linear_fma(const LinearParams& p, const LoraTerm* lora, const Context& context);
Status linear_plain(const LinearParams& p, const LoraTerm* lora, const Context& context);

// ---- and the input gradient's ----

Status backward_input_tiles(const LinearBackwardInputParams& p, const LoraTerm* lora,
                            const Context& context);
Status backward_input_wgmma(const LinearBackwardInputParams& p, const LoraTerm* lora,
                            const Context& context);
Status backward_input_fma(const LinearBackwardInputParams& p, const LoraTerm* lora,
                          const Context& context);
Status backward_input_plain(const LinearBackwardInputParams& p, const LoraTerm* lora,
                            const Context& context);

// A part of the plain way: out [M, cols] += the LoRA product, masked.
Status add_lora_fma(DType dtype, std::int64_t m, std::int64_t cols, void* out, const LoraTerm& lora,
                    const Context& context);

// ---- the choice ----

enum class Direction : std::uint8_t { forward, backward_input };

// The way that was forced, and an error where it cannot serve the case; else the one measured for
// such a case on that device (linear_measured.h), where it serves; else by the table.
Status linear_by_any_way(const LinearParams& p, const LoraTerm* lora, const Context& context);
Status backward_input_by_any_way(const LinearBackwardInputParams& p, const LoraTerm* lora,
                                 const Context& context);

// From now on that way ("plain", …) in every call of that direction, in the whole process; null: by
// what was measured and the table again. False where the name is none of that direction's ways.
// Before the first call of this, QLORA_CUDA_FORWARD and QLORA_CUDA_BACKWARD in the environment name
// them.
bool force_way(Direction direction, const char* name);
// The name of way i of a direction, or null past the last.
const char* way_name(Direction direction, int i);
// The way that the latest call of that direction took, on any thread; null before the first.
const char* last_way(Direction direction);

// What was measured on a device, in place of what was set for it before. False, and nothing is set,
// where a choice names a way that is not there.
bool set_choices(int device, std::span<const LinearChoice> choices);

}  // namespace qlora::cuda
