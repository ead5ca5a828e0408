#include "shadow.h"

#include <memory>
#include <string>

#include "fault.h"
#include "machine.h"

namespace emulation {
namespace {

constexpr std::int32_t kSeveralOfAWarp = -1 - kMaxBlockThreads;  // minus the warp's number
constexpr std::int32_t kSeveralWarps = -1;

struct Clock {
  std::uint32_t block, epoch, warp_epoch;
  std::int32_t thread;
};

Clock now() {
  Machine& machine = Machine::instance();
  return {machine.block_number(), machine.epoch(), machine.warp().epoch, machine.thread().index};
}

std::int32_t warp_of(std::int32_t thread) { return thread / kWarpSize; }

bool write_is_ordered(const Cell& cell, const Clock& clock) {
  if (cell.writer == clock.thread || cell.write_epoch != clock.epoch) return true;
  return warp_of(cell.writer) == warp_of(clock.thread) && cell.write_warp_epoch != clock.warp_epoch;
}

bool reads_are_ordered(const Cell& cell, const Clock& clock) {
  if (cell.read_block != clock.block || cell.read_epoch != clock.epoch) return true;
  if (cell.reader == clock.thread) return true;
  if (cell.reader == kSeveralWarps) return false;
  const std::int32_t warp = cell.reader >= 0 ? warp_of(cell.reader) : kSeveralOfAWarp - cell.reader;
  return warp == warp_of(clock.thread) && cell.read_warp_epoch != clock.warp_epoch;
}

std::string element(std::ptrdiff_t index) { return "element " + std::to_string(index); }

void refuse_in_flight(const Cell& cell, std::ptrdiff_t index, const Clock& clock,
                      const std::source_location& where) {
  if (cell.block == clock.block && cell.in_flight) {
    fault(FaultKind::in_flight, where,
          element(index) + " awaits an asynchronous copy of thread " + std::to_string(cell.writer));
  }
}

void write(Cell& cell, std::ptrdiff_t index, const std::source_location& where, bool atomic) {
  const Clock clock = now();
  refuse_in_flight(cell, index, clock, where);
  const bool written = cell.block == clock.block;
  const bool both_atomic = atomic && cell.atomic;
  if (written && !both_atomic && !write_is_ordered(cell, clock)) {
    fault(FaultKind::race, where,
          element(index) + " was written by thread " + std::to_string(cell.writer) +
              " with no barrier since");
  }
  if (!reads_are_ordered(cell, clock)) {
    fault(FaultKind::race, where,
          element(index) + " was read by another thread with no barrier since");
  }
  cell.block = clock.block;
  cell.writer = clock.thread;
  cell.write_epoch = clock.epoch;
  cell.write_warp_epoch = clock.warp_epoch;
  cell.atomic = atomic;
  cell.in_flight = false;
}

}  // namespace

void note_read(Cell& cell, std::ptrdiff_t index, const std::source_location& where) {
  const Clock clock = now();
  if (cell.block != clock.block) {
    fault(FaultKind::uninitialised, where, element(index) + " was never written");
  }
  refuse_in_flight(cell, index, clock, where);
  if (!write_is_ordered(cell, clock)) {
    fault(FaultKind::race, where,
          element(index) + " was written by thread " + std::to_string(cell.writer) +
              " with no barrier since");
  }
  const bool first_since_barrier = cell.read_block != clock.block || cell.read_epoch != clock.epoch;
  if (first_since_barrier) {
    cell.reader = clock.thread;
  } else if (cell.reader != clock.thread && cell.reader != kSeveralWarps) {
    const std::int32_t warp =
        cell.reader >= 0 ? warp_of(cell.reader) : kSeveralOfAWarp - cell.reader;
    cell.reader = warp == warp_of(clock.thread) ? kSeveralOfAWarp - warp : kSeveralWarps;
  }
  cell.read_block = clock.block;
  cell.read_epoch = clock.epoch;
  cell.read_warp_epoch = clock.warp_epoch;
}

void note_write(Cell& cell, std::ptrdiff_t index, const std::source_location& where) {
  write(cell, index, where, false);
}

void note_atomic(Cell& cell, std::ptrdiff_t index, const std::source_location& where) {
  if (cell.block != Machine::instance().block_number()) {
    fault(FaultKind::uninitialised, where, element(index) + " was never written");
  }
  write(cell, index, where, true);
}

void note_copy(Cell& cell, std::ptrdiff_t index, const std::source_location& where) {
  write(cell, index, where, false);
  cell.in_flight = true;
}

void note_arrival(Cell& cell) {
  const Clock clock = now();
  cell.write_epoch = clock.epoch;
  cell.write_warp_epoch = clock.warp_epoch;
  cell.in_flight = false;
}

DynamicMemory& dynamic_memory() {
  static const std::unique_ptr<DynamicMemory> memory = std::make_unique<DynamicMemory>();
  return *memory;
}

}  // namespace emulation
