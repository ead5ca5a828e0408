// The actors of the asynchronous proxy (clock.h): the tensor cores, an agent for each warp, and
// what copies in bulk, an agent for each mbarrier that such copies report to.
#pragma once

#include <array>
#include <cstdint>

#include "clock.h"

namespace emulation {

inline constexpr int kTensorCores = kMaxBlockThreads / 32;
inline constexpr int kCopyEngines = kAgents - kTensorCores;

constexpr int tensor_core_of(int warp) { return kMaxBlockThreads + warp; }
// The i-th mbarrier. Where there are more than engines, they share: less is found then.
constexpr int copy_engine_of(int i) { return kMaxBlockThreads + kTensorCores + i % kCopyEngines; }
constexpr bool is_tensor_core(int actor) {
  return actor >= kMaxBlockThreads && actor < kMaxBlockThreads + kTensorCores;
}

inline std::array<Moment, kAgents> latest_moments{};  // by agent

// A moment of it that is later than all before.
inline Moment next_moment(int agent) {
  static std::uint32_t time = kFirstAgentTime;
  return latest_moments[static_cast<std::size_t>(agent - kMaxBlockThreads)] = {agent, ++time};
}
inline Moment latest_moment(int agent) {
  return latest_moments[static_cast<std::size_t>(agent - kMaxBlockThreads)];
}

}  // namespace emulation
