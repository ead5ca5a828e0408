#include "cache.h"

#include <cstdio>

namespace qlora::cpu {
namespace {

constexpr std::int64_t kUntold = std::int64_t{32} << 20;

// From the kernel's own files: sysconf(_SC_LEVEL3_CACHE_SIZE) was ten times too large on a guest of
// an EPYC.
std::int64_t read_last_level() {
  std::int64_t largest = 0;
  for (int index = 0;; ++index) {
    char path[64];
    std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", index);
    std::FILE* const file = std::fopen(path, "r");
    if (file == nullptr) break;
    long long kilobytes = 0;
    if (std::fscanf(file, "%lldK", &kilobytes) == 1 && kilobytes * 1024 > largest) {
      largest = kilobytes * 1024;
    }
    std::fclose(file);
  }
  return largest > 0 ? largest : kUntold;
}

}  // namespace

std::int64_t last_level_cache_bytes() {
  static const std::int64_t bytes = read_last_level();
  return bytes;
}

}  // namespace qlora::cpu
