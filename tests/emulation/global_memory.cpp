#include "global_memory.h"

#include <algorithm>
#include <bit>
#include <string>

#include "allocations.h"
#include "fault.h"
#include "machine.h"
#include "readers.h"

namespace emulation {
namespace {

constexpr std::size_t kMostPages = 1024;  // then those of earlier launches are used again

[[noreturn]] void race(const std::source_location& where, const std::string& what) {
  fault(FaultKind::global_race, where, what);
}

}  // namespace

GlobalMemory& global_memory() {
  static GlobalMemory memory;
  return memory;
}

void GlobalMemory::begin_launch(std::uint32_t next_block) {
  first_block_ = next_block;
  tickets_.clear();
  if (pages_.size() > kMostPages) {
    for (auto& [number, page] : pages_) spare_.push_back(std::move(page));
    pages_.clear();
    recent_ = {};
  }
}

GlobalMemory::Page& GlobalMemory::page_of(std::uintptr_t address) {
  const std::uintptr_t number = address / kPageBytes;
  Recent& recent = recent_[number % recent_.size()];
  if (recent.page == nullptr || recent.number != number) {
    auto& page = pages_[number];
    if (page == nullptr && spare_.empty()) page = std::make_unique<Page>();
    if (page == nullptr) {  // what an earlier launch left in it is over, wherever it was
      page = std::move(spare_.back());
      spare_.pop_back();
    }
    recent = {number, page.get()};
  }
  return *recent.page;
}

void GlobalMemory::refine(Page& page, int granule) {
  std::vector<Cell> finer(static_cast<std::size_t>(kPageBytes / granule));
  const auto parts = static_cast<std::size_t>(page.granule / granule);
  for (std::size_t i = 0; i < finer.size(); ++i) finer[i] = page.cells[i / parts];
  page = {granule, std::move(finer)};
}

// Accesses are aligned to their size, which is at most 16: none crosses a page.
template <class Note>
void GlobalMemory::each(std::uintptr_t address, int bytes, const Note& note) {
  Page& page = page_of(address);
  if (bytes < page.granule) refine(page, bytes);
  const auto first = static_cast<int>(address % kPageBytes) / page.granule;
  for (int c = first; c < first + bytes / page.granule; ++c) {
    note(page.cells[static_cast<std::size_t>(c)]);
  }
}

// Whether the running thread knows what that other block did: that moment of it, or anything.
bool GlobalMemory::is_known(std::uint32_t block, const Moment* moment) const {
  const Actor actor = running_thread();
  return std::any_of(acquired_.begin(), acquired_.end(), [&](const Acquired& acquired) {
    return acquired.what->block == block && actor.clock.knows(acquired.moment) &&
           (moment == nullptr || acquired.what->known.knows(*moment));
  });
}

void GlobalMemory::must_know_writer(const Cell& cell, const std::source_location& where) const {
  if (cell.write_block < first_block_) return;
  const Moment moment{cell.writer, cell.write_time};
  const bool own = cell.write_block == Machine::instance().block_number();
  if (own ? running_thread().clock.knows(moment) : is_known(cell.write_block, &moment)) return;
  race(where,
       own ? "it was written by thread " + std::to_string(cell.writer) + " with no barrier since"
           : "it was written by another block, which has not published it to this one");
}

void GlobalMemory::must_know_readers(const Cell& cell, const std::source_location& where) const {
  if (cell.read_block < first_block_) return;
  if (cell.read_constant) race(where, "it was read in this launch as what nothing writes");
  const bool own = cell.read_block == Machine::instance().block_number();
  if (own && !readers().all_known(cell.readers, running_thread())) {
    race(where, "it was read by another thread with no barrier since");
  }
  if (cell.read_by_more || (!own && !is_known(cell.read_block, nullptr))) {
    race(where, "it was read by another block");
  }
}

void GlobalMemory::read(std::uintptr_t address, int bytes, bool constant,
                        const std::source_location& where) {
  allocations().touch(address, bytes, false);
  const std::uint32_t block = Machine::instance().block_number();
  each(address, bytes, [&](Cell& cell) {
    if (constant && cell.write_block >= first_block_) {
      race(where, "it is read as what nothing writes, and was written in this launch");
    }
    must_know_writer(cell, where);
    if (cell.read_block < first_block_) {
      cell.read_by_more = false;
      cell.read_constant = false;
    }
    if (cell.read_block != block) {
      cell.read_by_more |= cell.read_block >= first_block_;
      cell.read_block = block;
      cell.readers = kNoReaders;
    }
    cell.read_constant |= constant;
    if (!constant) cell.readers = readers().add(cell.readers, running_thread());
  });
}

void GlobalMemory::write(std::uintptr_t address, int bytes, const std::source_location& where) {
  allocations().touch(address, bytes, true);
  const Machine& machine = Machine::instance();
  const Moment now = running_thread().now;
  each(address, bytes, [&](Cell& cell) {
    must_know_writer(cell, where);
    must_know_readers(cell, where);
    cell = {.write_block = machine.block_number(),
            .write_time = now.time,
            .writer = static_cast<std::int16_t>(now.actor)};
  });
}

void GlobalMemory::atomic(std::uintptr_t address, int bytes, const std::source_location& where) {
  allocations().touch(address, bytes, true);
  const Machine& machine = Machine::instance();
  const Moment now = running_thread().now;
  each(address, bytes, [&](Cell& cell) {
    if (!cell.atomic) must_know_writer(cell, where);
    must_know_readers(cell, where);
    cell = {.write_block = machine.block_number(),
            .write_time = now.time,
            .writer = static_cast<std::int16_t>(now.actor),
            .atomic = true};
  });
  Tickets& own = Machine::instance().thread().tickets;
  std::vector<Published>& published = tickets_[address];
  own.observed.insert(own.observed.end(), published.begin(), published.end());
  if (own.fenced != nullptr) published.push_back(own.fenced);
}

void GlobalMemory::acquire(const Published& what, const Moment& moment) {
  acquired_.push_back({what, moment});
  for (const Published& other : what->of_others) acquire(other, moment);
}

void GlobalMemory::fence() {
  Machine& machine = Machine::instance();
  Thread& thread = machine.thread();
  for (const Published& what : thread.tickets.observed) acquire(what, thread.now());
  thread.tickets.observed.clear();
  auto publication =
      std::make_shared<Publication>(Publication{machine.block_number(), thread.knows.own, {}});
  for (const Acquired& acquired : acquired_) {
    if (thread.knows.own.knows(acquired.moment)) publication->of_others.push_back(acquired.what);
  }
  thread.tickets.fenced = std::move(publication);
  machine.tick(thread);
}

}  // namespace emulation
