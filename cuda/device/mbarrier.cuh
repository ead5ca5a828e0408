// Barriers in shared memory that count arrivals (PTX: mbarrier). sm_90 and later.
//
// An mbarrier is in a phase until the arrivals it was initialised for have come; then the next
// phase begins, for as many arrivals. Who waits names a phase by its parity: the first is 0. What a
// thread wrote before it arrived is seen by those who waited for that phase.
#pragma once

#include <cstdint>

#include "device/shared.cuh"

namespace qlora::cuda {

using Mbarrier = std::uint64_t;  // opaque

// mbarrier.init: by one thread; others use it after a barrier of the block, and bulk copies after a
// fence_async_proxy() before that.
__device__ inline void init_mbarrier(Shared<Mbarrier> barriers, int i, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
               :
               : "r"(barriers.address(i)), "r"(arrivals)
               : "memory");
}

// mbarrier.arrive
__device__ inline void arrive(Shared<Mbarrier> barriers, int i) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(barriers.address(i)) : "memory");
}

// mbarrier.arrive.expect_tx: so many bytes more must land (bulk_copy.cuh) before the phase ends;
// and arrives.
__device__ inline void arrive_expecting(Shared<Mbarrier> barriers, int i, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :
               : "r"(barriers.address(i)), "r"(bytes)
               : "memory");
}

// mbarrier.try_wait.parity, until it says that the phase of that parity is over.
__device__ inline void wait_phase(Shared<Mbarrier> barriers, int i, int parity) {
  int over = 0;
  while (over == 0) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.s32 %0, 1, 0, p;\n"
        "}"
        : "=r"(over)
        : "r"(barriers.address(i)), "r"(parity)
        : "memory");
  }
}

}  // namespace qlora::cuda
