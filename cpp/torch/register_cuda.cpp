// The ops for CUDA tensors. A torch without CUDA knows the key as well, and never calls them.
#include "implementations.h"

STABLE_TORCH_LIBRARY_IMPL(qlora_native, CUDA, m) { qlora::torch_ops::implement_all(m); }
