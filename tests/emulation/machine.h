// The emulated GPU: runs a grid of blocks, a fibre per thread, and knows which thread is running.
//
// One block of threads runs at a time, to its end. Within it one fibre runs until it has to wait
// (at a barrier, for its warp) or ends: the order in which those that may go on do so is drawn from
// a seed, so that different seeds interleave the threads differently. Seed 0 is ascending order.
//
// Nothing here knows what a kernel computes; the twins of cuda/device (device/*.cuh) call it.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <source_location>
#include <vector>

#include "clock.h"
#include "copies.h"
#include "fault.h"
#include "fibre.h"
#include "global_memory.h"
#include "products.h"

namespace emulation {

inline constexpr int kWarpSize = 32;
// Few and little, so that small tensors need several turns of a grid and several panels.
inline constexpr int kMultiprocessors = 2;
inline constexpr int kAbundantMultiprocessors = 1 << 24;
inline constexpr int kL2Bytes = 32 * 1024;

struct Warp;

struct Thread {
  Fibre fibre;
  int index = 0;  // in its block
  bool done = false;
  std::uint32_t time = 0;
  Knowledge knows;                 // this thread's own time, too
  const char* waits_at = nullptr;  // for messages: where it waited last
  FaultKind if_forever = FaultKind::barrier;
  std::source_location where;
  // For the exchanges of a warp: what this lane offers, from whom it takes, what it got.
  std::uint64_t offered = 0;
  int source = 0;
  std::uint64_t received = 0;
  void* operands = nullptr;  // of an instruction of the whole warp
  AsyncCopies copies;
  AsyncProducts products;
  Tickets tickets;

  [[nodiscard]] Moment now() const { return {index, time}; }
};

// What such an instruction does, given the operands of lane 0 to 31, once all lanes are there.
using Together = void (*)(const std::array<void*, kWarpSize>& operands);

// A lane that takes part without taking a value (a vote, a barrier of the warp).
inline constexpr int kNoSource = -1;

struct Warp {
  int lanes = 0;         // of it that have not ended
  int arrived = 0;       // in the exchange that is going on
  bool ordered = false;  // that exchange orders memory: a barrier of the warp
  const char* what = nullptr;
  std::source_location where;
  std::uint32_t ballot = 0;
  Together together = nullptr;
};

struct Launch {
  std::int64_t grid = 0;
  int block = 0;
  std::size_t dynamic_shared = 0;
};

class Machine {
 public:
  static Machine& instance();

  // kernel() once per thread. The fault that ended it, if any.
  std::optional<Fault> run(const Launch& launch, const std::function<void()>& kernel);

  void set_seed(std::uint64_t seed) { seed_ = seed; }

  // The compute capability that launchers are told (90: a Hopper card). Every kernel runs on the
  // machine whatever it says: it decides which way a launcher takes.
  void set_architecture(int number) { architecture_ = number; }
  [[nodiscard]] int architecture() const { return architecture_; }

  // Run only so many blocks at either end of every grid, on a card so large that each has work of
  // its own: a kernel on a tensor past 2^31 elements, of which the rest stays untouched. 0: all.
  void set_only_ends(std::int64_t blocks) { only_ends_ = blocks; }
  [[nodiscard]] int multiprocessors() const {
    return only_ends_ > 0 ? kAbundantMultiprocessors : kMultiprocessors;
  }

  // ---- asked by the running thread ----
  [[nodiscard]] Thread& thread() { return *current_; }
  [[nodiscard]] const Thread& thread_at(int index) const {
    return *threads_[static_cast<std::size_t>(index)];
  }
  [[nodiscard]] Warp& warp() {
    return warps_[static_cast<std::size_t>(thread().index / kWarpSize)];
  }
  [[nodiscard]] const Launch& launch() const { return launch_; }
  [[nodiscard]] std::int64_t block_index() const { return block_index_; }
  // Of the blocks that ever ran: memory written under another number was not written by this one.
  [[nodiscard]] std::uint32_t block_number() const { return block_number_; }
  // The running thread hands what it knows on, or learns: what orders memory, clock.h.
  void release(Knowledge& to);
  void acquire(const Knowledge& from);
  void learn(const Moment& of_agent);
  void tick(Thread& thread);  // and so its time goes on
  // It waits in that queue (`what`, in messages) until another thread wakes all who do.
  void wait_in(std::vector<Thread*>& queue, const char* what, const std::source_location& where);
  void wake(std::vector<Thread*>& queue);

  void sync_block(const std::source_location& where);
  void sync_warp(const std::source_location& where);
  std::uint64_t exchange(std::uint64_t value, int source_lane, const std::source_location& where);
  std::uint32_t ballot(bool predicate, const std::source_location& where);
  // An instruction of all 32 lanes, each with operands of its own, which it finds changed after.
  void together(const char* what, void* operands, Together instruction,
                const std::source_location& where);

 private:
  static void thread_main(void* self);
  void run_block();
  void begin_block();
  void end_thread(Thread& thread);
  void release_block();
  void meet_warp(const char* what, bool ordered, Together together,
                 const std::source_location& where);
  void release_warp(std::size_t warp);
  void make_ready(std::size_t first, std::size_t last);
  void shuffle_ready(std::size_t begin);
  void wait(FaultKind if_forever, const char* what, const std::source_location& where);
  [[nodiscard]] Fault stuck() const;
  std::uint64_t random();

  Launch launch_;
  const std::function<void()>* kernel_ = nullptr;
  std::array<std::unique_ptr<Thread>, kMaxBlockThreads> threads_;
  std::vector<Warp> warps_;
  std::vector<Thread*> ready_;  // taken from the end
  Thread* current_ = nullptr;
  std::optional<Fault> fault_;
  int architecture_ = 80;
  std::uint64_t seed_ = 0;
  std::int64_t only_ends_ = 0;
  std::uint64_t random_ = 0;
  std::int64_t block_index_ = 0;
  std::uint32_t block_number_ = 0;
  std::uint32_t latest_ = 0;  // of all threads' times, in all blocks
  int alive_ = 0;
  int at_barrier_ = 0;
  std::source_location barrier_;
};

}  // namespace emulation
