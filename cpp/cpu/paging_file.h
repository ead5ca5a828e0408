// The pager "file": a file without a name, mapped into memory.
#pragma once

#include "qlora_native/paging.h"

namespace qlora::cpu {

const Pager& file_pager();

}  // namespace qlora::cpu
