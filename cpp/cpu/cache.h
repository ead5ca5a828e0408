// The caches of the processor this runs on, as the operating system tells them.
#pragma once

#include <cstdint>

namespace qlora::cpu {

// Of the largest one, which cores share; read once. 32 MiB where the system does not tell.
std::int64_t last_level_cache_bytes();

}  // namespace qlora::cpu
