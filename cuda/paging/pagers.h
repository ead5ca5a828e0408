// The two pagers of a GPU, as tables of functions.
#pragma once

#include "qlora_native/paging.h"

namespace qlora::cuda {

// "managed": one address for both sides, whose pages are moved before they are needed.
const Pager& managed_pager();

// "staged": pinned memory of the host, and a window of device memory that is copied to and from.
const Pager& staged_pager();

}  // namespace qlora::cuda
