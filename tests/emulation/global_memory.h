// What the emulator remembers of global memory during a launch: who wrote and read what, and what
// blocks of threads have published to each other.
//
// Within a block, threads are ordered by what they know (clock.h). Blocks run one after another
// here and at the same time on a GPU: what one wrote, or read, another may touch only by the
// pattern
//
//   one:      accesses; a barrier; fence_gpu(); an atomic on a ticket
//   another:  an atomic on the ticket; fence_gpu(); a barrier; accesses
//
// Every launch knows what the ones before it did.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <source_location>
#include <unordered_map>
#include <vector>

#include "clock.h"

namespace emulation {

// What a thread's fence made ready to be published by its next atomics.
struct Publication {
  std::uint32_t block;
  Clock known;
  std::vector<std::shared_ptr<const Publication>> of_others;  // that it knew of
};
using Published = std::shared_ptr<const Publication>;

// A thread's part in it.
struct Tickets {
  Published fenced;                 // by its last fence
  std::vector<Published> observed;  // by its atomics since then
};

class GlobalMemory {
 public:
  // Writes and reads of earlier blocks than this one are over.
  void begin_launch(std::uint32_t next_block);
  void begin_block() { acquired_.clear(); }

  // `constant`: through the path of what nothing writes during the launch (ld.global.nc).
  void read(std::uintptr_t address, int bytes, bool constant, const std::source_location& where);
  void write(std::uintptr_t address, int bytes, const std::source_location& where);
  void atomic(std::uintptr_t address, int bytes, const std::source_location& where);
  void fence();

 private:
  static constexpr int kPageBytes = 4096;

  struct Cell {
    std::uint32_t write_block = 0;
    std::uint32_t write_time = 0;
    std::uint32_t read_block = 0;  // the last one
    std::uint32_t readers = 0;     // of that block
    std::int16_t writer = 0;
    bool atomic = false;         // the last write
    bool read_by_more = false;   // blocks than the last one
    bool read_constant = false;  // by any
  };
  // A cell for each `granule` bytes: the largest that all accesses so far are multiples of.
  struct Page {
    int granule = kPageBytes;
    std::vector<Cell> cells = std::vector<Cell>(1);
  };
  struct Acquired {
    Published what;
    Moment moment;  // of the fence
  };

  Page& page_of(std::uintptr_t address);
  static void refine(Page& page, int granule);
  template <class Note>
  void each(std::uintptr_t address, int bytes, const Note& note);
  void must_know_writer(const Cell& cell, const std::source_location& where) const;
  void must_know_readers(const Cell& cell, const std::source_location& where) const;
  [[nodiscard]] bool is_known(std::uint32_t block, const Moment* moment) const;
  void acquire(const Published& what, const Moment& moment);

  std::uint32_t first_block_ = 1;  // of the launch
  std::unordered_map<std::uintptr_t, std::unique_ptr<Page>> pages_;
  std::vector<std::unique_ptr<Page>> spare_;
  struct Recent {
    std::uintptr_t number = 0;
    Page* page = nullptr;
  };
  std::array<Recent, 64> recent_;
  std::unordered_map<std::uintptr_t, std::vector<Published>> tickets_;  // by address
  std::vector<Acquired> acquired_;                                      // by the running block
};

GlobalMemory& global_memory();

}  // namespace emulation
