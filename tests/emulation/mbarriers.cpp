#include "mbarriers.h"

#include <cstring>

#include "agents.h"
#include "copies.h"
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
  const int index = static_cast<int>(barriers_.size());
  barriers_.insert({at, Barrier{.index = index, .arrivals = arrivals, .pending = arrivals}});
}

void Mbarriers::arrive(const void* at, const std::source_location& where) {
  Barrier& barrier = find(at, where);
  if (barrier.pending == 0) {
    fault(FaultKind::barrier, where, "one arrival too many: this phase only waits for bytes");
  }
  Machine::instance().release(barrier.gathered);
  --barrier.pending;
  end_if_over(barrier);
}

void Mbarriers::expect(const void* at, int bytes, const std::source_location& where) {
  find(at, where).expected += bytes;
}

void Mbarriers::copy(const void* at, const SharedBytes& to, const void* source,
                     const std::source_location& where) {
  Barrier& barrier = find(at, where);
  const Moment moment = next_moment(copy_engine_of(barrier.index));
  note_start(to, {moment, Machine::instance().thread().knows.fenced}, where);
  std::memset(to.bytes, kPoison, static_cast<std::size_t>(to.size));
  const auto* bytes = static_cast<const unsigned char*>(source);
  barrier.copies.push_back({to, {bytes, bytes + to.size}, moment});
  end_if_over(barrier);
}

void Mbarriers::end_if_over(Barrier& barrier) {
  if (barrier.pending > 0) return;
  for (const BulkCopy& copy : barrier.copies) {
    std::memcpy(copy.to.bytes, copy.bytes.data(), copy.bytes.size());
    note_arrival(copy.to, copy.moment);
    barrier.gathered.learn(copy.moment);
    barrier.expected -= copy.to.size;
  }
  barrier.copies.clear();
  if (barrier.expected != 0) return;
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
