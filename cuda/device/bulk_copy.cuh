// Bulk copies from global into shared memory, by the tensor memory accelerator (PTX:
// cp.async.bulk). sm_90 and later.
//
//   arrive_expecting(barriers, i, bytes); bulk_copy(to, …, barriers, i); …
//   wait_phase(barriers, i, parity);                    then the bytes are there, for whoever
//   waited
//
// One dimension only: a tile of codes is fetched a part of a row at a time, which needs no tensor
// map, hence no call of the driver's and no state beside the kernel's arguments.
#pragma once

#include <cstdint>

#include "device/global.cuh"
#include "device/mbarrier.cuh"
#include "device/shared.cuh"

namespace qlora::cuda {

// cp.async.bulk: n elements of `from` at j to `to` at i; both addresses and the bytes are multiples
// of 16. An access of the asynchronous proxy: fence.cuh.
template <class T>
__device__ void bulk_copy(Shared<T> to, int i, Global<const T> from, std::int64_t j, int n,
                          Shared<Mbarrier> barriers, int barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      :
      : "r"(to.address(i)), "l"(__cvta_generic_to_global(from.address(j))),
        "r"(n * static_cast<int>(sizeof(T))), "r"(barriers.address(barrier))
      : "memory");
}

}  // namespace qlora::cuda
