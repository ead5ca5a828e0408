// What the emulator remembers of an element of memory: who wrote it, who read it, when (clock.h).
//
// Two accesses by different actors, one of them a write, race unless the later one's actor knew of
// the earlier. Since threads run one after another here, this finds a missing barrier whatever the
// order in which they happened to come.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

#include "clock.h"

namespace emulation {

struct Cell {
  std::uint32_t block = 0;       // in which what follows was noted; 0: never
  std::uint32_t write_time = 0;  // 0: not written in that block
  std::uint32_t readers = 0;     // since the last write (readers.h)
  std::int16_t writer = 0;
  bool atomic = false;     // the last write
  bool in_flight = false;  // the last write is an asynchronous copy that has not arrived

  friend bool operator==(const Cell&, const Cell&) = default;
};

// A part of shared memory, in bytes and in cells.
struct SharedBytes {
  unsigned char* bytes;
  int size;
  Cell* cells;
  int cell_count;
  int index;     // of the first element
  int elements;  // for messages
};

// Who touches memory, and what it knows. An agent knows what was fenced by those who started it.
struct Actor {
  Moment now;
  const Clock& clock;
};
Actor running_thread();

using Where = std::source_location;

void note_read(const SharedBytes& range, const Actor& actor, const Where& where);
void note_write(const SharedBytes& range, const Actor& actor, const Where& where);
void note_atomic(const SharedBytes& range, const Actor& actor, const Where& where);
// An asynchronous copy starts, as a write does; until it arrives, nobody may touch the range. It
// arrives as a write of that moment.
void note_start(const SharedBytes& range, const Actor& actor, const Where& where);
void note_arrival(const SharedBytes& range, const Moment& moment);

// The block's dynamic shared memory, a cell for each byte.
struct DynamicMemory {
  static constexpr std::size_t kBytes = 227 * 1024;
  alignas(1024) unsigned char bytes[kBytes];
  Cell cells[kBytes];
};
DynamicMemory& dynamic_memory();

}  // namespace emulation
