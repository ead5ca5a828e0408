// Chooses the CPU path at run time: what was built, what the processor has (cpu_features.h), and
// what the user forces (QLORA_FORCE_ISA).
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpu_features.h"
#include "isa.h"

namespace qlora::cpu {
namespace {

struct Isa {
  const char* name;
  const Backend* backend;
  bool runs;
};

// Narrowest first; those that do not run here are left in, so that they can be named.
const Isa* isas() {
  static const Features found = detect_features();
  static const Isa table[] = {
      {"scalar", &scalar_backend, true},
#if defined(QLORA_HAS_AVX2)
      {"avx2", &avx2_backend, found.avx2},
      {"avx512", &avx512_backend, found.avx512},
      {"avx512bf16", &avx512bf16_backend, found.avx512bf16},
#endif
#if defined(QLORA_HAS_NEON)
      {"neon", &neon_backend, found.neon},
      {"neonbf16", &neonbf16_backend, found.neonbf16},
#endif
      {nullptr, nullptr, false},
  };
  return table;
}

const Isa* widest() {
  const Isa* best = isas();
  for (const Isa* isa = isas(); isa->name != nullptr; ++isa) {
    if (isa->runs) best = isa;
  }
  return best;
}

const Isa* find(const char* name) {
  for (const Isa* isa = isas(); isa->name != nullptr; ++isa) {
    if (std::strcmp(isa->name, name) == 0) return isa->runs ? isa : nullptr;
  }
  return nullptr;
}

const Isa* initial() {
  const char* forced = std::getenv("QLORA_FORCE_ISA");
  if (forced == nullptr || *forced == '\0') return widest();
  if (const Isa* isa = find(forced)) return isa;
  std::fprintf(stderr, "qlora_native: QLORA_FORCE_ISA=%s does not run here; using %s\n", forced,
               widest()->name);
  return widest();
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> isa{initial()};
  return isa;
}

}  // namespace

const Backend& backend() { return *current().load(std::memory_order_acquire)->backend; }

bool force_isa(const char* name) {
  const Isa* isa = name == nullptr || *name == '\0' ? widest() : find(name);
  if (isa == nullptr) return false;
  current().store(isa, std::memory_order_release);
  return true;
}

const char* isa_name() { return current().load(std::memory_order_acquire)->name; }

const char* available_isa(int i) {
  for (const Isa* isa = isas(); isa->name != nullptr; ++isa) {
    if (isa->runs && i-- == 0) return isa->name;
  }
  return nullptr;
}

const char* built_isa(int i) {
  for (const Isa* isa = isas(); isa->name != nullptr; ++isa) {
    if (i-- == 0) return isa->name;
  }
  return nullptr;
}

}  // namespace qlora::cpu
