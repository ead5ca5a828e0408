// The CUDA backend: what the torch layer may know of it.
#pragma once

#include "qlora_native/backend.h"

namespace qlora::cuda {

// Runs on Context's device and stream. Without a usable GPU every call answers with a Status.
const Backend& backend();

}  // namespace qlora::cuda
