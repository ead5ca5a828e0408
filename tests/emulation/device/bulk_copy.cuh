// Twin of cuda/device/bulk_copy.cuh: a copy takes its bytes when it starts and lands when its
// mbarrier's phase ends (mbarriers.h).
#pragma once

#include <cstdint>

#include "agents.h"
#include "device/global.cuh"
#include "device/mbarrier.cuh"
#include "device/shared.cuh"

namespace qlora::cuda {

template <class T>
void bulk_copy(Shared<T> to, int i, Global<const T> from, std::int64_t j, int n,
               Shared<Mbarrier> barriers, int barrier, const Where& where = Where::current()) {
  constexpr int kPiece = 16 / static_cast<int>(sizeof(T));
  if (n <= 0 || n % kPiece != 0) {
    emulation::fault(emulation::FaultKind::misaligned, where, "a bulk copy of no whole 16 bytes");
  }
  const auto pieces = from.template load_run<kPiece>(j, n / kPiece, where);
  const auto at = barriers.bytes_of<Mbarrier>(barrier, where);
  const emulation::Moment now = emulation::next_moment(emulation::copy_engine_of(0));
  emulation::note_read(at, {now, machine().thread().knows.fenced}, where);
  emulation::mbarriers().copy(at.bytes, to.template range_of<Vec<T, kPiece>>(i, n / kPiece, where),
                              pieces.data(), where);
}

}  // namespace qlora::cuda
