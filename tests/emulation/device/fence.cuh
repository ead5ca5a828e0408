// Twin of cuda/device/fence.cuh: clock.h.
#pragma once

#include "device/thread.cuh"

namespace qlora::cuda {

inline void fence_async_proxy() {
  machine().thread().knows.fence();
  machine().tick(machine().thread());
}

}  // namespace qlora::cuda
