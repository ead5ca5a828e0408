#include "torch_symbol.h"

#include <dlfcn.h>

namespace qlora::torch_ops {

void* find_torch_symbol(const char* library, const char* name) {
  // Python loads torch's libraries out of each other's sight: asked for by name, not loaded anew.
  void* const loaded = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  return dlsym(loaded != nullptr ? loaded : RTLD_DEFAULT, name);
}

}  // namespace qlora::torch_ops
