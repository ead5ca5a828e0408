#include "cache.h"

#include <unistd.h>

namespace qlora::cpu {
namespace {

std::int64_t read_last_level() {
#if defined(_SC_LEVEL3_CACHE_SIZE)
  const std::int64_t bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
  if (bytes > 0) return bytes;
#endif
  return std::int64_t{32} << 20;
}

}  // namespace

std::int64_t last_level_cache_bytes() {
  static const std::int64_t bytes = read_last_level();
  return bytes;
}

}  // namespace qlora::cpu
