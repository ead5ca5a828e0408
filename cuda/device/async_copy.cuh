// Copies from global into shared memory that a thread starts and waits for later (PTX: cp.async).
//
// The destination may be read, or written again, once the thread that started the copy has waited
// for its group; by other threads after a barrier that follows that wait. Nobody may still read
// what the copy will overwrite when it is started.
//
//   async_copy<16>(stage, i, x, j); … ; commit_copies();      the group of this stage
//   wait_copies<1>(); sync_block();                            all groups but the newest are there
//
// Before sm_80 there are no such copies: the thread loads and stores at once, and a group is
// nothing.
#pragma once

#include <cstdint>

#include "device/global.cuh"
#include "device/shared.cuh"

namespace qlora::cuda {

// cp.async: kBytes of `from` at element j to `to` at element i, both aligned to kBytes. Not valid:
// zeros, and nothing is read. 16 bytes pass by the first-level cache (.cg), 4 and 8 through it.
template <int kBytes, class T>
__device__ void async_copy(Shared<T> to, int i, Global<const T> from, std::int64_t j,
                           bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "what cp.async copies");
#if __CUDA_ARCH__ >= 800
  const auto source = __cvta_generic_to_global(from.address(j));
  const int bytes_read = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(to.address(i)), "l"(source), "r"(bytes_read)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :
                 : "r"(to.address(i)), "l"(source), "n"(kBytes), "r"(bytes_read)
                 : "memory");
  }
#else
  constexpr int kElements = kBytes / static_cast<int>(sizeof(T));
  Vec<T, kElements> values{};
  if (valid) values = from.template load_vec<kElements>(j);
  to.template store_vec<kElements>(i, values);
#endif
}

// cp.async.commit_group: the copies of this thread since the last one are a group (an empty one,
// too, counts).
__device__ inline void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}

// cp.async.wait_group: until at most the kPending newest groups of this thread are under way.
template <int kPending>
__device__ void wait_copies() {
  static_assert(kPending >= 0);
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
#endif
}

}  // namespace qlora::cuda
