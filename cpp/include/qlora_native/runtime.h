// What the shared library tells about the process it runs in.
#pragma once

#include <span>

#include "qlora_native/backend.h"
#include "qlora_native/export.h"
#include "qlora_native/linear_choice.h"

namespace qlora {

// Threads that an op may use: torch.get_num_threads().
QLORA_EXPORT int num_threads();

// Whether, and for which outputs, the ops ask for huge pages.
QLORA_EXPORT const char* huge_pages();

// For tests: CPU tensors go to this backend from now on; null: to the CPU backend again.
QLORA_EXPORT void serve_host_tensors_by(const Backend* backend);

// The ways in which the CUDA backend can multiply by a 4-bit weight (cuda/launch/linear_paths.h):
// the name of way i, forward or of the input gradient, or null past the last; and the one to take
// from now on, whatever the case, or by the tables again (null). False: no such way.
QLORA_EXPORT const char* cuda_linear_way(bool forward, int i);
QLORA_EXPORT bool force_cuda_linear(bool forward, const char* name);
// The one that the latest call took, or null; and the choices that were measured on a device, in
// place of those it had, which come before the shipped table's. False: one names no such way.
QLORA_EXPORT const char* last_cuda_linear_way(bool forward);
QLORA_EXPORT bool set_cuda_linear_choices(int device, std::span<const LinearChoice> choices);

}  // namespace qlora
