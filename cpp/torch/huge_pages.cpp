#include "huge_pages.h"

#include <cstdint>

#include "qlora_native/runtime.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(__linux__) && defined(MADV_HUGEPAGE)

namespace qlora {

const char* huge_pages() { return "asked for by madvise for fresh outputs of 4 MiB and more"; }

namespace torch_ops {
namespace {

constexpr std::uintptr_t kHugePage = std::uintptr_t{2}
                                     << 20;  // x86-64's, and arm64's of 4 kB pages
constexpr std::size_t kLargeOutput = std::size_t{2} * kHugePage;  // at least one whole huge page

}  // namespace

void advise_huge_pages(void* data, std::size_t bytes) {
  if (bytes < kLargeOutput) return;
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  // An error means that this kernel has none to give.
  (void)::madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

}  // namespace torch_ops
}  // namespace qlora

#else

namespace qlora {

const char* huge_pages() { return "no: this system has no madvise for them"; }

void torch_ops::advise_huge_pages(void*, std::size_t) {}

}  // namespace qlora

#endif
