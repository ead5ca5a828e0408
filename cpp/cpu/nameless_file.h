// A file on a disk that no directory lists: the system removes it with the process, however that
// ends.
#pragma once

#include <cstdint>

#include "qlora_native/status.h"

namespace qlora::cpu {

// Makes one of `bytes` zeros whose room is reserved, in `directory` (null: TMPDIR or /var/tmp).
// Where it fails, errno says why, and nothing is left behind.
Status open_nameless_file(const char* directory, std::int64_t bytes, int* descriptor);

}  // namespace qlora::cpu
