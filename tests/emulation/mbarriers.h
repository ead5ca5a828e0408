// The mbarriers of a block (PTX: mbarrier): phases, and what their arrivals hand on.
//
// A wait names a phase by its parity, and ends when the running phase has the other one: as on a
// GPU, a wait for the wrong parity either never ends or ends at once, and then its thread knows
// nothing of what it goes on to read (shadow.h).
#pragma once

#include <cstdint>
#include <source_location>
#include <unordered_map>
#include <vector>

#include "clock.h"

namespace emulation {

struct Thread;

class Mbarriers {
 public:
  // `at`: its bytes in shared memory, which name it.
  void init(const void* at, int arrivals, const std::source_location& where);
  void arrive(const void* at, const std::source_location& where);
  void wait(const void* at, int parity, const std::source_location& where);
  // A block begins.
  void forget() { barriers_.clear(); }

 private:
  struct Barrier {
    int arrivals = 0;  // of a phase
    int pending = 0;
    std::uint32_t phase = 0;
    Clock gathered{};   // what those who came so far knew
    Clock handed_on{};  // when the last phase that is over ended
    std::vector<Thread*> waiting{};
  };
  Barrier& find(const void* at, const std::source_location& where);

  std::unordered_map<const void*, Barrier> barriers_;
};

Mbarriers& mbarriers();

}  // namespace emulation
