// Chooses the CPU path at run time: what the processor says (CPUID), what the operating system
// saves (XGETBV), and what the user forces (QLORA_FORCE_ISA).
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "isa.h"

#if defined(QLORA_HAS_AVX2)
#include <cpuid.h>
#endif

namespace qlora::cpu {
namespace {

struct Isa {
  const char* name;
  const Backend* backend;
  bool runs;
};

#if defined(QLORA_HAS_AVX2)
struct Cpuid {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Cpuid cpuid(unsigned leaf, unsigned subleaf) {
  Cpuid r;
  if (__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx) == 0) return {};
  return r;
}

// The register state that the operating system saves: bit 1 SSE, 2 AVX, 5..7 AVX-512.
unsigned saved_state() {
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

constexpr bool has(unsigned word, int bit) { return ((word >> bit) & 1u) != 0; }

struct Features {
  bool avx2 = false, avx512 = false, avx512bf16 = false;
};

Features detect() {
  Features found;
  const Cpuid basic = cpuid(1, 0);
  if (!has(basic.ecx, 27)) return found;  // OSXSAVE
  const unsigned state = saved_state();
  const Cpuid extended = cpuid(7, 0);
  const bool fma_f16c_avx = has(basic.ecx, 12) && has(basic.ecx, 29) && has(basic.ecx, 28);
  found.avx2 = (state & 0x6u) == 0x6u && fma_f16c_avx && has(extended.ebx, 5);
  const bool f_dq_bw_vl = has(extended.ebx, 16) && has(extended.ebx, 17) && has(extended.ebx, 30) &&
                          has(extended.ebx, 31);
  found.avx512 = found.avx2 && (state & 0xE6u) == 0xE6u && f_dq_bw_vl;
  found.avx512bf16 = found.avx512 && has(cpuid(7, 1).eax, 5);
  return found;
}
#endif

// Narrowest first; those that do not run here are left in, so that they can be named.
const Isa* isas() {
#if defined(QLORA_HAS_AVX2)
  static const Features features = detect();
  static const Isa table[] = {{"scalar", &scalar_backend, true},
                              {"avx2", &avx2_backend, features.avx2},
                              {"avx512", &avx512_backend, features.avx512},
                              {"avx512bf16", &avx512bf16_backend, features.avx512bf16},
                              {nullptr, nullptr, false}};
#else
  static const Isa table[] = {{"scalar", &scalar_backend, true}, {nullptr, nullptr, false}};
#endif
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
