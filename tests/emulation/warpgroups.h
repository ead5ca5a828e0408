// What warps of a block share beside its barrier: instructions of a whole warpgroup, named
// barriers, and the multiprocessor's registers.
#pragma once

#include <array>
#include <cstdint>
#include <source_location>
#include <vector>

#include "clock.h"

namespace emulation {

struct Thread;

inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kNamedBarriers = 16;
inline constexpr int kRegisters = 65536;  // of a multiprocessor

// What an instruction does, given the operands of the warpgroup's threads.
using OperandsOfWarpgroup = std::array<void*, kWarpgroupThreads>;
using WarpgroupTogether = void (*)(const OperandsOfWarpgroup& operands,
                                   const std::source_location& where);

class Warpgroups {
 public:
  // A block of so many threads begins; no other is resident.
  void begin_block(int threads);

  // The running thread's part of an instruction of its warpgroup; the last to come carries it out.
  // Nobody learns anything by it.
  void together(const char* what, void* operands, WarpgroupTogether instruction,
                const std::source_location& where);
  // Barrier `id` of so many threads, of whole warps.
  void sync_named(int id, int threads, const std::source_location& where);
  // The registers of each thread of the warp from here on: fewer, or more, as soon as there are.
  void give_registers(int count, const std::source_location& where);
  void take_registers(int count, const std::source_location& where);

 private:
  struct Meeting {
    int arrived = 0;
    std::source_location where;
    OperandsOfWarpgroup operands{};
    std::vector<Thread*> waiting;
  };
  struct Named {
    int threads = 0;  // that are waited for
    int arrived = 0;
    Knowledge gathered{};
    Knowledge handed_on{};
    std::vector<Thread*> waiting;
  };

  std::vector<Meeting> meetings_;  // of each warpgroup
  std::array<Named, kNamedBarriers> named_;
  std::vector<int> registers_;  // of each warp's threads
  int free_registers_ = 0;
  std::vector<Thread*> wanting_;
};

Warpgroups& warpgroups();

}  // namespace emulation
