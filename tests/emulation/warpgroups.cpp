#include "warpgroups.h"

#include <algorithm>
#include <string>
#include <string_view>

#include "fault.h"
#include "machine.h"

namespace emulation {
namespace {

constexpr int kMostRegisters = 256;  // of a thread

Thread& self() { return Machine::instance().thread(); }

bool same_line(const std::source_location& a, const std::source_location& b) {
  return a.line() == b.line() && std::string_view(a.file_name()) == b.file_name();
}

}  // namespace

Warpgroups& warpgroups() {
  static Warpgroups warpgroups;
  return warpgroups;
}

void Warpgroups::begin_block(int threads) {
  const auto of = [threads](int size) {
    return static_cast<std::size_t>((threads - 1) / size + 1);
  };
  meetings_.assign(of(kWarpgroupThreads), {});
  for (Named& barrier : named_) {
    barrier.arrived = 0;
    barrier.waiting.clear();
  }
  const int each = std::min(kRegisters / threads / 8 * 8, kMostRegisters);
  registers_.assign(of(kWarpSize), each);
  free_registers_ = kRegisters - static_cast<int>(registers_.size()) * kWarpSize * each;
  wanting_.clear();
}

void Warpgroups::together(const char* what, void* operands, WarpgroupTogether instruction,
                          const std::source_location& where) {
  const int index = self().index;
  const int first = index / kWarpgroupThreads * kWarpgroupThreads;
  if (first + kWarpgroupThreads > Machine::instance().launch().block) {
    fault(FaultKind::warp, where, std::string(what) + " needs four whole warps");
  }
  Meeting& meeting = meetings_[static_cast<std::size_t>(index / kWarpgroupThreads)];
  if (meeting.arrived > 0 && !same_line(meeting.where, where)) {
    fault(FaultKind::warp, where, std::string(what) + ": the warpgroup's others are elsewhere");
  }
  meeting.where = where;
  meeting.operands[static_cast<std::size_t>(index - first)] = operands;
  if (++meeting.arrived < kWarpgroupThreads) {
    Machine::instance().wait_in(meeting.waiting, what, where);
    return;
  }
  meeting.arrived = 0;
  instruction(meeting.operands, where);
  Machine::instance().wake(meeting.waiting);
}

void Warpgroups::sync_named(int id, int threads, const std::source_location& where) {
  if (id < 0 || id >= kNamedBarriers || threads < kWarpSize || threads % kWarpSize != 0) {
    fault(FaultKind::configuration, where, "no such named barrier");
  }
  Named& barrier = named_[static_cast<std::size_t>(id)];
  if (barrier.arrived > 0 && barrier.threads != threads) {
    fault(FaultKind::barrier, where, "others wait there for another number of threads");
  }
  barrier.threads = threads;
  Machine::instance().release(barrier.gathered);
  if (++barrier.arrived < threads) {
    Machine::instance().wait_in(barrier.waiting, "a named barrier", where);
  } else {
    barrier.arrived = 0;
    barrier.handed_on = barrier.gathered;
    Machine::instance().wake(barrier.waiting);
  }
  Machine::instance().acquire(barrier.handed_on);
}

void Warpgroups::give_registers(int count, const std::source_location& where) {
  int& own = registers_[static_cast<std::size_t>(self().index / kWarpSize)];
  if (count > own) fault(FaultKind::configuration, where, "setmaxnreg.dec to more than there are");
  free_registers_ += (own - count) * kWarpSize;
  own = count;
  Machine::instance().wake(wanting_);
}

void Warpgroups::take_registers(int count, const std::source_location& where) {
  int& own = registers_[static_cast<std::size_t>(self().index / kWarpSize)];
  if (count < own) fault(FaultKind::configuration, where, "setmaxnreg.inc to fewer than there are");
  while (free_registers_ < (count - own) * kWarpSize) {
    Machine::instance().wait_in(wanting_, "registers", where);
  }
  free_registers_ -= (count - own) * kWarpSize;
  own = count;
}

}  // namespace emulation
