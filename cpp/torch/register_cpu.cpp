// The ops for CPU tensors.
#include "implementations.h"

STABLE_TORCH_LIBRARY_IMPL(qlora_native, CPU, m) { qlora::torch_ops::implement_all(m); }
