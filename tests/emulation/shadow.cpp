#include "shadow.h"

#include <memory>
#include <string>

#include "agents.h"
#include "fault.h"
#include "machine.h"
#include "readers.h"

namespace emulation {
namespace {

// The other actor, as a message has it.
std::string name_of(int actor) {
  if (actor < kMaxBlockThreads) return "thread " + std::to_string(actor);
  return is_tensor_core(actor) ? "wgmma" : "a bulk copy";
}

// One access, noted in cell after cell. Neighbours mostly have the same past, and then get the same
// future.
class Access {
 public:
  Access(const SharedBytes& range, const Actor& actor, const Where& where)
      : range_(range), actor_(actor), where_(where), block_(Machine::instance().block_number()) {}

  template <class Note>
  void each(const Note& note) {
    Cell before;
    const Cell* after = nullptr;
    for (at_ = 0; at_ < range_.cell_count; ++at_) {
      Cell& cell = range_.cells[at_];
      if (after != nullptr && cell == before) {
        cell = *after;
        continue;
      }
      before = cell;
      if (cell.block != block_) cell = {.block = block_};
      if (cell.in_flight) {
        refuse(FaultKind::in_flight, "awaits an asynchronous copy, by " + name_of(cell.writer));
      }
      note(cell);
      after = &cell;
    }
  }

  void must_be_written(const Cell& cell) const {
    if (cell.write_time == 0) refuse(FaultKind::uninitialised, "was never written");
  }
  void must_know_writer(const Cell& cell) const {
    if (cell.write_time == 0 || actor_.clock.knows({cell.writer, cell.write_time})) return;
    refuse(FaultKind::race, "was written by " + name_of(cell.writer) + lacking());
  }
  void must_know_readers(const Cell& cell) const {
    if (readers().all_known(cell.readers, actor_)) return;
    refuse(FaultKind::race, "was read by another actor" + lacking());
  }
  void read(Cell& cell) const { cell.readers = readers().add(cell.readers, actor_); }
  void write(Cell& cell, bool atomic, bool in_flight) const {
    cell = {.block = block_,
            .write_time = actor_.now.time,
            .readers = kNoReaders,
            .writer = static_cast<std::int16_t>(actor_.now.actor),
            .atomic = atomic,
            .in_flight = in_flight};
  }

 private:
  [[noreturn]] void refuse(FaultKind kind, const std::string& what) const {
    const int cells_of_element = range_.cell_count / range_.elements;
    fault(kind, where_,
          "element " + std::to_string(range_.index + at_ / cells_of_element) + " " + what);
  }

  [[nodiscard]] std::string lacking() const {
    return actor_.now.actor < kMaxBlockThreads ? " with no barrier since"
                                               : " with no barrier and fence of proxies since";
  }

  const SharedBytes& range_;
  const Actor& actor_;
  const Where& where_;
  std::uint32_t block_;
  int at_ = 0;
};

void note_plain_write(const SharedBytes& range, const Actor& actor, const Where& where,
                      bool in_flight) {
  Access access(range, actor, where);
  access.each([&](Cell& cell) {
    access.must_know_writer(cell);
    access.must_know_readers(cell);
    access.write(cell, false, in_flight);
  });
}

}  // namespace

Actor running_thread() {
  const Thread& thread = Machine::instance().thread();
  return {thread.now(), thread.knows.own};
}

void note_read(const SharedBytes& range, const Actor& actor, const Where& where) {
  Access access(range, actor, where);
  access.each([&](Cell& cell) {
    access.must_be_written(cell);
    access.must_know_writer(cell);
    access.read(cell);
  });
}

void note_write(const SharedBytes& range, const Actor& actor, const Where& where) {
  note_plain_write(range, actor, where, false);
}

void note_start(const SharedBytes& range, const Actor& actor, const Where& where) {
  note_plain_write(range, actor, where, true);
}

void note_atomic(const SharedBytes& range, const Actor& actor, const Where& where) {
  Access access(range, actor, where);
  access.each([&](Cell& cell) {
    access.must_be_written(cell);
    if (!cell.atomic) access.must_know_writer(cell);
    access.must_know_readers(cell);
    access.write(cell, true, false);
  });
}

void note_arrival(const SharedBytes& range, const Moment& moment) {
  for (int c = 0; c < range.cell_count; ++c) {
    Cell& cell = range.cells[c];
    cell.writer = static_cast<std::int16_t>(moment.actor);
    cell.write_time = moment.time;
    cell.in_flight = false;
  }
}

DynamicMemory& dynamic_memory() {
  static const std::unique_ptr<DynamicMemory> memory = std::make_unique<DynamicMemory>();
  return *memory;
}

}  // namespace emulation
