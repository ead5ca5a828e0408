#include "mbarriers.h"

#include "fault.h"
#include "machine.h"

namespace emulation {
namespace {

constexpr int kMostArrivals = (1 << 20) - 1;

}  // namespace

Mbarriers& mbarriers() {
  static Mbarriers mbarriers;
  return mbarriers;
}

Mbarriers::Barrier& Mbarriers::find(const void* at, const std::source_location& where) {
  const auto found = barriers_.find(at);
  if (found == barriers_.end()) {
    fault(FaultKind::uninitialised, where, "no mbarrier was initialised here");
  }
  return found->second;
}

void Mbarriers::init(const void* at, int arrivals, const std::source_location& where) {
  if (arrivals < 1 || arrivals > kMostArrivals) {
    fault(FaultKind::barrier, where, "an mbarrier of no possible number of arrivals");
  }
  if (barriers_.contains(at)) fault(FaultKind::barrier, where, "an mbarrier initialised twice");
  barriers_.insert({at, Barrier{.arrivals = arrivals, .pending = arrivals}});
}

void Mbarriers::arrive(const void* at, const std::source_location& where) {
  Barrier& barrier = find(at, where);
  Machine::instance().release(barrier.gathered);
  if (--barrier.pending > 0) return;
  barrier.pending = barrier.arrivals;
  ++barrier.phase;
  barrier.handed_on = barrier.gathered;
  Machine::instance().wake(barrier.waiting);
}

void Mbarriers::wait(const void* at, int parity, const std::source_location& where) {
  Barrier& barrier = find(at, where);
  while (static_cast<int>(barrier.phase & 1u) == parity) {
    Machine::instance().wait_in(barrier.waiting, "an mbarrier", where);
  }
  Machine::instance().acquire(barrier.handed_on);
}

}  // namespace emulation
