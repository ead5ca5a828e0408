// The pagers by name.
#include <array>
#include <cstddef>
#include <cstring>

#include "paging_file.h"
#include "qlora_native/paging.h"

namespace qlora {
namespace {

// One more than there can be, so that null ends it.
std::array<const Pager*, 9>& table() {
  static std::array<const Pager*, 9> pagers{&cpu::file_pager()};
  return pagers;
}

}  // namespace

const Pager* pager(int i) { return table().at(static_cast<std::size_t>(i)); }

const Pager* find_pager(const char* name) {
  for (const Pager* each : table()) {
    if (each != nullptr && std::strcmp(each->name, name) == 0) return each;
  }
  return nullptr;
}

void add_pager(const Pager& added) {
  for (const Pager*& each : table()) {
    if (each == nullptr || std::strcmp(each->name, added.name) == 0) {
      each = &added;
      return;
    }
  }
}

}  // namespace qlora
