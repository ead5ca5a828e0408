// Twin of cuda/device/warpgroup.cuh: warpgroups.h.
#pragma once

#include "device/thread.cuh"
#include "warpgroups.h"

namespace qlora::cuda {

inline constexpr int kWarpgroupThreads = emulation::kWarpgroupThreads;
inline constexpr bool kHasWarpgroups = true;
inline constexpr bool kBuiltForWarpgroups = true;
inline constexpr int kWarpgroupArchitecture = 90;

inline int warpgroup_index() { return thread_index() / kWarpgroupThreads; }

template <int kRegisters>
void give_registers(const Where& where = Where::current()) {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  sync_warp(where);
  if (lane_index() == 0) emulation::warpgroups().give_registers(kRegisters, where);
}

template <int kRegisters>
void take_registers(const Where& where = Where::current()) {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  sync_warp(where);
  if (lane_index() == 0) emulation::warpgroups().take_registers(kRegisters, where);
}

inline void sync_named(int id, int threads, const Where& where = Where::current()) {
  emulation::warpgroups().sync_named(id, threads, where);
}

}  // namespace qlora::cuda
