// Functions of torch's C shim that only some builds of torch have, or that have a name for each
// device: looked up at run time, so that one library serves every build.
#pragma once

namespace qlora::torch_ops {

// Null where no libtorch that is loaded has it.
void* find_torch_symbol(const char* library, const char* name);

// As a function of that type, and again until it is found: torch may load its CUDA half after this
// library.
template <class Function>
Function torch_function(Function& found, const char* library, const char* name) {
  if (found == nullptr) found = reinterpret_cast<Function>(find_torch_symbol(library, name));
  return found;
}

}  // namespace qlora::torch_ops
