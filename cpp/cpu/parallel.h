// A loop over the caller's threads, written as a lambda:
//
//     parallel_for(context, n, grain, [&](std::int64_t begin, std::int64_t end) { … });
#pragma once

#include <cstdint>

#include "qlora_native/backend.h"

namespace qlora::cpu {

// body(begin, end) on disjoint ranges that cover [0, n), each of at least `grain` where n allows
// it.
template <class Body>
void parallel_for(const Context& context, std::int64_t n, std::int64_t grain, const Body& body) {
  if (n <= 0) return;
  if (context.parallel_for == nullptr || n <= grain) {
    body(std::int64_t{0}, n);
    return;
  }
  const auto run = [](void* arg, std::int64_t begin, std::int64_t end) {
    (*static_cast<const Body*>(arg))(begin, end);
  };
  context.parallel_for(n, grain, run, const_cast<Body*>(&body));
}

// body(part) for each part of [0, n_parts), as many at a time as there are threads.
template <class Body>
void parallel_parts(const Context& context, std::int64_t n_parts, const Body& body) {
  parallel_for(context, n_parts, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t part = begin; part < end; ++part) body(part);
  });
}

// body(part, block) for each block of [0, n_blocks), handed out as the parts ask for them: a thread
// that wakes late, or shares its processor, takes fewer. `part` tells scratch apart.
template <class Body>
void parallel_blocks(const Context& context, std::int64_t n_parts, std::int64_t n_blocks,
                     const Body& body) {
  std::int64_t next = 0;
  parallel_parts(context, n_parts, [&](std::int64_t part) {
    for (;;) {
      const std::int64_t block = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (block >= n_blocks) return;
      body(part, block);
    }
  });
}

}  // namespace qlora::cpu
