// A run of kernels under three orders of threads, with a digest of what each leaves: what the tests
// of tests/python compare a mutant with.
#pragma once

#include <cstdint>
#include <cstdio>

#include "machine.h"
#include "run_buffers.h"

namespace emulated_run {

// run() adds its results to the digest.
template <class Run>
void print_digests(Run&& run) {
  for (const std::uint64_t seed : {0, 1, 2}) {
    emulation::Machine::instance().set_seed(seed);
    static_cast<void>(take_digest());
    run();
    std::printf("%016llx\n", static_cast<unsigned long long>(take_digest()));
  }
}

}  // namespace emulated_run
