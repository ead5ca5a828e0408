// The instruction sets this build has, and the one in use.
#pragma once

#include "qlora_native/backend.h"
#include "qlora_native/export.h"

namespace qlora::cpu {

// Defined by the isa_*.cpp files: the first in every build, the others where the processor is an
// x86-64 or an AArch64 one (cmake/Isa.cmake).
extern const Backend scalar_backend;
extern const Backend avx2_backend;
extern const Backend avx512_backend;
extern const Backend avx512bf16_backend;
extern const Backend neon_backend;
extern const Backend neonbf16_backend;

// The widest path that this processor and its operating system run, unless QLORA_FORCE_ISA or
// force_isa() names another.
const Backend& backend();

// "scalar", "avx2", "avx512", "avx512bf16", "neon" or "neonbf16"; null or "" goes back to the
// widest. False, and nothing changed, where the name is unknown, not built, or not run by this
// processor.
QLORA_EXPORT bool force_isa(const char* name);

// The name of the path in use; the i-th path that could be; the i-th that was built (null past the
// last).
QLORA_EXPORT const char* isa_name();
QLORA_EXPORT const char* available_isa(int i);
QLORA_EXPORT const char* built_isa(int i);

}  // namespace qlora::cpu
