#include "machine.h"

#include <algorithm>
#include <string>
#include <string_view>
#include <utility>

#include "counters.h"
#include "mbarriers.h"
#include "readers.h"
#include "warpgroups.h"

namespace emulation {
namespace {

std::string place(const std::source_location& where) {
  std::string path = where.file_name();
  if (const auto slash = path.rfind('/'); slash != std::string::npos) path.erase(0, slash + 1);
  return path + ":" + std::to_string(where.line());
}

bool same_place(const std::source_location& a, const std::source_location& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::string_view(a.file_name()) == b.file_name();
}

struct Thrown {
  Fault fault;
};

}  // namespace

const char* name_of(FaultKind kind) {
  switch (kind) {
    case FaultKind::out_of_bounds:
      return "out of bounds";
    case FaultKind::misaligned:
      return "misaligned";
    case FaultKind::uninitialised:
      return "uninitialised shared memory";
    case FaultKind::race:
      return "race on shared memory";
    case FaultKind::global_race:
      return "race on global memory";
    case FaultKind::in_flight:
      return "in flight";
    case FaultKind::barrier:
      return "divergent barrier";
    case FaultKind::warp:
      return "divergent warp exchange";
    case FaultKind::configuration:
      return "launch configuration";
    case FaultKind::unordered:
      return "race between streams";
    case FaultKind::page_fault:
      return "page fault";
    case FaultKind::misuse:
      return "runtime misuse";
  }
  return "fault";
}

void fault(FaultKind kind, const std::source_location& where, const std::string& what) {
  Machine& machine = Machine::instance();
  throw Thrown{{kind, std::string(name_of(kind)) + " at " + place(where) + ", block " +
                          std::to_string(machine.block_index()) + ", thread " +
                          std::to_string(machine.thread().index) + ": " + what}};
}

Machine& Machine::instance() {
  static Machine machine;
  return machine;
}

std::uint64_t Machine::random() {  // xorshift64*, Vigna 2016
  random_ ^= random_ >> 12;
  random_ ^= random_ << 25;
  random_ ^= random_ >> 27;
  return random_ * 0x2545F4914F6CDD1Dull;
}

std::optional<Fault> Machine::run(const Launch& launch, const std::function<void()>& kernel) {
  const bool fits = launch.block >= 1 && launch.block <= kMaxBlockThreads && launch.grid >= 1 &&
                    launch.grid <= 0x7FFFFFFF && launch.dynamic_shared <= 227 * 1024;
  if (!fits) return Fault{FaultKind::configuration, "launch configuration: no GPU takes it"};
  launch_ = launch;
  kernel_ = &kernel;
  fault_.reset();
  random_ = seed_ * 0x9E3779B97F4A7C15ull + 1;
  global_memory().begin_launch(block_number_ + 1);
  for (block_index_ = 0; block_index_ < launch.grid && !fault_; ++block_index_) {
    if (only_ends_ > 0 && block_index_ == only_ends_) {
      block_index_ = std::max(block_index_, launch.grid - only_ends_);
    }
    run_block();
  }
  kernel_ = nullptr;
  return std::exchange(fault_, std::nullopt);
}

void Machine::begin_block() {
  ++block_number_;
  readers().forget(true);
  mbarriers().forget();
  warpgroups().begin_block(launch_.block);
  global_memory().begin_block();
  const std::uint32_t before = latest_;
  alive_ = launch_.block;
  at_barrier_ = 0;
  warps_.assign(static_cast<std::size_t>((launch_.block + kWarpSize - 1) / kWarpSize), {});
  ready_.clear();
  for (int i = 0; i < launch_.block; ++i) {
    auto& slot = threads_[static_cast<std::size_t>(i)];
    if (slot == nullptr) slot = std::make_unique<Thread>();
    slot->index = i;
    slot->done = false;
    slot->time = before;
    slot->knows.settle(before);
    tick(*slot);
    slot->waits_at = nullptr;
    slot->copies = {};
    slot->products = {};
    slot->tickets = {};
    slot->fibre.start(&Machine::thread_main, slot.get());
    ++warps_[static_cast<std::size_t>(i / kWarpSize)].lanes;
  }
  make_ready(0, static_cast<std::size_t>(launch_.block));
}

void Machine::run_block() {
  begin_block();
  while (!ready_.empty() && !fault_) {
    current_ = ready_.back();
    ready_.pop_back();
    current_->fibre.switch_to();
  }
  current_ = nullptr;
  if (!fault_ && alive_ > 0) fault_ = stuck();
  counters().end_block();
}

void Machine::thread_main(void* self) {
  Machine& machine = instance();
  auto& thread = *static_cast<Thread*>(self);
  try {
    (*machine.kernel_)();
  } catch (Thrown& thrown) {
    machine.fault_ = std::move(thrown.fault);
  }
  machine.end_thread(thread);
  thread.fibre.leave();
}

// Barriers and exchanges are of the threads that have not ended.
void Machine::end_thread(Thread& thread) {
  thread.done = true;
  --alive_;
  const auto index = static_cast<std::size_t>(thread.index / kWarpSize);
  --warps_[index].lanes;
  if (alive_ > 0 && at_barrier_ == alive_) release_block();
}

void Machine::wait(FaultKind if_forever, const char* what, const std::source_location& where) {
  Thread& self = thread();
  self.waits_at = what;
  self.if_forever = if_forever;
  self.where = where;
  self.fibre.leave();
}

// The threads [first, last) may go on, in an order of the seed.
void Machine::make_ready(std::size_t first, std::size_t last) {
  const std::size_t begin = ready_.size();
  for (std::size_t i = last; i-- > first;) {
    Thread& thread = *threads_[i];
    if (thread.done) continue;
    ready_.push_back(&thread);
  }
  shuffle_ready(begin);
}

void Machine::shuffle_ready(std::size_t begin) {
  if (seed_ == 0) return;
  for (std::size_t i = ready_.size(); i > begin + 1; --i) {
    std::swap(ready_[i - 1], ready_[begin + random() % (i - begin)]);
  }
}

void Machine::wait_in(std::vector<Thread*>& queue, const char* what,
                      const std::source_location& where) {
  queue.push_back(&thread());
  wait(FaultKind::barrier, what, where);
}

void Machine::wake(std::vector<Thread*>& queue) {
  const std::size_t begin = ready_.size();
  ready_.insert(ready_.end(), queue.begin(), queue.end());
  shuffle_ready(begin);
  queue.clear();
}

void Machine::sync_block(const std::source_location& where) {
  if (at_barrier_ > 0 && !same_place(barrier_, where)) {
    fault(FaultKind::barrier, where, "other threads wait at " + place(barrier_));
  }
  barrier_ = where;
  // The last one to come releases all, and itself goes on in its turn.
  if (++at_barrier_ == alive_) release_block();
  wait(FaultKind::barrier, "a barrier of the block", where);
}

void Machine::release_block() {
  at_barrier_ = 0;
  // All that a thread did so far is known to all, and what any of them knows of agents.
  Knowledge joint;
  for (int i = 0; i < launch_.block; ++i) joint.learn(threads_[static_cast<std::size_t>(i)]->knows);
  joint.own.settle(latest_);
  const std::uint32_t before = latest_;
  for (int i = 0; i < launch_.block; ++i) {
    Thread& thread = *threads_[static_cast<std::size_t>(i)];
    if (thread.done) continue;
    thread.knows.own.settle(before);
    thread.knows.learn(joint);
    thread.time = before;
    tick(thread);
  }
  readers().forget(false);
  make_ready(0, static_cast<std::size_t>(launch_.block));
}

void Machine::tick(Thread& thread) {
  ++thread.time;
  thread.knows.own.learn(thread.now());
  latest_ = std::max(latest_, thread.time);
}

void Machine::release(Knowledge& to) {
  to.learn(thread().knows);
  tick(thread());
}

void Machine::acquire(const Knowledge& from) {
  thread().knows.learn(from);
  tick(thread());
}

void Machine::learn(const Moment& of_agent) {
  thread().knows.learn(of_agent);
  tick(thread());
}

void Machine::meet_warp(const char* what, bool ordered, Together together,
                        const std::source_location& where) {
  const auto index = static_cast<std::size_t>(thread().index / kWarpSize);
  Warp& w = warps_[index];
  if (w.arrived > 0 && (!same_place(w.where, where) || w.what != what)) {
    fault(FaultKind::warp, where,
          std::string("other lanes wait in ") + w.what + " at " + place(w.where));
  }
  const int full = launch_.block - static_cast<int>(index) * kWarpSize;
  if (w.lanes < (full < kWarpSize ? full : kWarpSize)) {
    fault(FaultKind::warp, where, "a lane that should take part has ended");
  }
  w.what = what;
  w.where = where;
  w.ordered = ordered;
  w.together = together;
  if (++w.arrived == w.lanes) release_warp(index);
  wait(FaultKind::warp, what, where);
}

// All lanes are here: each gets what it asked for, and may go on.
void Machine::release_warp(std::size_t index) {
  Warp& w = warps_[index];
  const std::size_t first = index * kWarpSize;
  const std::size_t last = first + static_cast<std::size_t>(w.lanes);
  for (std::size_t i = first; i < last; ++i) {
    Thread& lane = *threads_[i];
    if (lane.source == kNoSource) continue;
    const std::size_t from = first + static_cast<std::size_t>(lane.source);
    lane.received = from < last ? threads_[from]->offered : lane.offered;
  }
  w.ballot = 0;
  for (std::size_t i = first; i < last; ++i) {
    if (threads_[i]->offered != 0) w.ballot |= std::uint32_t{1} << (i - first);
  }
  if (w.together != nullptr) {
    std::array<void*, kWarpSize> operands{};
    for (std::size_t i = first; i < last; ++i) operands[i - first] = threads_[i]->operands;
    w.together(operands);
  }
  w.arrived = 0;
  if (w.ordered) {
    Knowledge joint;
    for (std::size_t i = first; i < last; ++i) joint.learn(threads_[i]->knows);
    for (std::size_t i = first; i < last; ++i) {
      threads_[i]->knows.learn(joint);
      tick(*threads_[i]);
    }
  }
  make_ready(first, last);
}

void Machine::sync_warp(const std::source_location& where) {
  thread().source = kNoSource;
  meet_warp("a barrier of the warp", true, nullptr, where);
}

std::uint64_t Machine::exchange(std::uint64_t value, int source_lane,
                                const std::source_location& where) {
  thread().offered = value;
  thread().source = source_lane & (kWarpSize - 1);
  meet_warp("a shuffle", false, nullptr, where);
  return thread().received;
}

std::uint32_t Machine::ballot(bool predicate, const std::source_location& where) {
  thread().offered = predicate ? 1 : 0;
  thread().source = kNoSource;
  meet_warp("a vote", false, nullptr, where);
  return warp().ballot;
}

void Machine::together(const char* what, void* operands, Together instruction,
                       const std::source_location& where) {
  if (warp().lanes < kWarpSize) {
    fault(FaultKind::warp, where, std::string(what) + " needs 32 lanes, and some are not there");
  }
  thread().operands = operands;
  thread().source = kNoSource;
  meet_warp(what, false, instruction, where);
}

Fault Machine::stuck() const {
  bool in_warp = false;
  const Thread* first = nullptr;
  int waiting = 0;
  for (int i = 0; i < launch_.block; ++i) {
    const Thread& t = *threads_[static_cast<std::size_t>(i)];
    if (t.done) continue;
    ++waiting;
    if (first == nullptr) first = &t;
    in_warp |= t.if_forever == FaultKind::warp;
  }
  const FaultKind kind = in_warp ? FaultKind::warp : FaultKind::barrier;
  return {kind, std::string(name_of(kind)) + " in block " + std::to_string(block_index_) + ": " +
                    std::to_string(waiting) + " threads wait for ones that never come, thread " +
                    std::to_string(first->index) + " at " + first->waits_at + ", " +
                    place(first->where)};
}

}  // namespace emulation
