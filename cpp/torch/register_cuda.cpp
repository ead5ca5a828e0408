// The ops for CUDA tensors. A torch without CUDA knows the key as well, and never calls them.
// And the pagers of a GPU: whether there is one is asked when one of them is used.
#include "implementations.h"
#include "paging/pagers.h"
#include "qlora_native/paging.h"

STABLE_TORCH_LIBRARY_IMPL(qlora_native, CUDA, m) { qlora::torch_ops::implement_all(m); }

namespace {

[[maybe_unused]] const bool added = [] {
  qlora::add_pager(qlora::cuda::managed_pager());
  qlora::add_pager(qlora::cuda::staged_pager());
  return true;
}();

}  // namespace
