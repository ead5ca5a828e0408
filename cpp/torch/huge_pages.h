// Huge pages for large fresh outputs.
//
// A fresh megabyte is 256 page faults, each of which the kernel answers with 4 kB of zeros: for an
// op that only streams its output, several times the work itself. Where the system hands out huge
// pages to those who ask (transparent_hugepage/enabled is `madvise` or `always`), one fault brings
// 2 MB, and the threads that write the output share the faults.
#pragma once

#include <cstddef>

namespace qlora::torch_ops {

// Asks for huge pages where `data` covers whole ones. A hint, which no value depends on: the kernel
// may refuse it, and pages that are there already stay as they are. Small outputs are left alone,
// for a huge page takes longer to clear than they take to fill.
void advise_huge_pages(void* data, std::size_t bytes);

}  // namespace qlora::torch_ops
