// The fence between the generic proxy, by which threads load and store, and the asynchronous one,
// by which bulk copies and wgmma see shared memory (PTX: Async proxy). sm_90 and later.
#pragma once

namespace qlora::cuda {

// fence.proxy.async: bulk copies and wgmma that are started from here on, by this thread or by
// those who wait for it at a barrier, see (and may overwrite) what this thread, and those for whom
// it waited at one, stored. Who has waited for a copy or a product needs no fence to see its
// results.
__device__ inline void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" : : : "memory");
}

}  // namespace qlora::cuda
