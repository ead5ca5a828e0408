// The mbarriers of a block (PTX: mbarrier): phases, and what their arrivals hand on.
//
// A wait names a phase by its parity, and ends when the running phase has the other one: as on a
// GPU, a wait for the wrong parity either never ends or ends at once, and then its thread knows
// nothing of what it goes on to read (shadow.h).
//
// A phase ends when all its arrivals have come and all bytes that they expect have landed. Bulk
// copies land together, as late as that allows, whatever the order in which a GPU may bring them.
#pragma once

#include <cstdint>
#include <source_location>
#include <unordered_map>
#include <vector>

#include "clock.h"
#include "shadow.h"

namespace emulation {

struct Thread;

class Mbarriers {
 public:
  // `at`: its bytes in shared memory, which name it.
  void init(const void* at, int arrivals, const std::source_location& where);
  void arrive(const void* at, const std::source_location& where);
  void wait(const void* at, int parity, const std::source_location& where);
  // So many bytes more before the running phase ends.
  void expect(const void* at, int bytes, const std::source_location& where);
  // A bulk copy of `source` (as many bytes as `to`), started by the running thread.
  void copy(const void* at, const SharedBytes& to, const void* source,
            const std::source_location& where);
  // A block begins.
  void forget() { barriers_.clear(); }

 private:
  struct BulkCopy {
    SharedBytes to;
    std::vector<unsigned char> bytes;
    Moment moment;
  };
  struct Barrier {
    int index = 0;
    int arrivals = 0;  // of a phase
    int pending = 0;
    std::int64_t expected = 0;  // bytes of the running phase that have not landed
    std::uint32_t phase = 0;
    Knowledge gathered{};   // what those who came so far knew
    Knowledge handed_on{};  // when the last phase that is over ended
    std::vector<BulkCopy> copies{};
    std::vector<Thread*> waiting{};
  };
  Barrier& find(const void* at, const std::source_location& where);
  static void end_if_over(Barrier& barrier);

  std::unordered_map<const void*, Barrier> barriers_;
};

Mbarriers& mbarriers();

}  // namespace emulation
