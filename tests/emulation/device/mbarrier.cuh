// Twin of cuda/device/mbarrier.cuh: phases and what they hand on, mbarriers.h. That the word itself
// is initialised, and was so before others use it, its cell knows.
#pragma once

#include <cstdint>

#include "device/shared.cuh"
#include "mbarriers.h"

namespace qlora::cuda {

using Mbarrier = std::uint64_t;

inline void init_mbarrier(Shared<Mbarrier> barriers, int i, int arrivals,
                          const Where& where = Where::current()) {
  const auto at = barriers.bytes_of<Mbarrier>(i, where);
  emulation::note_write(at, emulation::running_thread(), where);
  emulation::mbarriers().init(at.bytes, arrivals, where);
}

inline void arrive(Shared<Mbarrier> barriers, int i, const Where& where = Where::current()) {
  const auto at = barriers.bytes_of<Mbarrier>(i, where);
  emulation::note_read(at, emulation::running_thread(), where);
  emulation::mbarriers().arrive(at.bytes, where);
}

inline void arrive_expecting(Shared<Mbarrier> barriers, int i, int bytes,
                             const Where& where = Where::current()) {
  const auto at = barriers.bytes_of<Mbarrier>(i, where);
  emulation::note_read(at, emulation::running_thread(), where);
  emulation::mbarriers().expect(at.bytes, bytes, where);
  emulation::mbarriers().arrive(at.bytes, where);
}

inline void wait_phase(Shared<Mbarrier> barriers, int i, int parity,
                       const Where& where = Where::current()) {
  const auto at = barriers.bytes_of<Mbarrier>(i, where);
  emulation::note_read(at, emulation::running_thread(), where);
  emulation::mbarriers().wait(at.bytes, parity, where);
}

}  // namespace qlora::cuda
