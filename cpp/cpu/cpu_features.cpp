// On x86-64: CPUID, and XGETBV for what the operating system saves. On AArch64: NEON is always
// there, and Linux tells the rest in the auxiliary vector.
#include "cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace qlora::cpu {

#if defined(__x86_64__)

namespace {

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

}  // namespace

Features detect_features() {
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

#elif defined(__aarch64__)

Features detect_features() {
  Features found;
  found.neon = true;
#if defined(__linux__)
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16, which older headers do not name
  found.neonbf16 = (getauxval(AT_HWCAP2) & kBf16) != 0;
#endif
  return found;
}

#else

Features detect_features() { return {}; }

#endif

}  // namespace qlora::cpu
