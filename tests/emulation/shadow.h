// What the emulator remembers of an element of shared memory: who wrote it, who read it, when.
//
// Two accesses by different threads, one of them a write, are ordered by a barrier of the block
// between them or, within a warp, by a barrier of the warp; otherwise they race. (A shuffle orders
// no memory.) Since a block's barriers are met by all its threads, their number is a clock that all
// share, and a warp's own barriers are a second one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

namespace emulation {

struct Cell {
  std::uint32_t block = 0;  // in which it was written; 0: never
  std::int32_t writer = 0;  // thread
  std::uint32_t write_epoch = 0;
  std::uint32_t write_warp_epoch = 0;
  std::int32_t reader = 0;  // thread, or one of the two below
  std::uint32_t read_block = 0;
  std::uint32_t read_epoch = 0;
  std::uint32_t read_warp_epoch = 0;
  bool atomic = false;     // the last write
  bool in_flight = false;  // the last write is an asynchronous copy that nobody waited for yet
};

// A part of shared memory, in bytes and in cells.
struct SharedBytes {
  unsigned char* bytes;
  int size;
  Cell* cells;
  int cell_count;
  std::ptrdiff_t index;  // of the first element, for messages
};

void note_read(Cell& cell, std::ptrdiff_t index, const std::source_location& where);
void note_write(Cell& cell, std::ptrdiff_t index, const std::source_location& where);
void note_atomic(Cell& cell, std::ptrdiff_t index, const std::source_location& where);
// An asynchronous copy starts, as a write does, and is there at the wait of the thread that started
// it.
void note_copy(Cell& cell, std::ptrdiff_t index, const std::source_location& where);
void note_arrival(Cell& cell);

// The block's dynamic shared memory, a cell for each byte.
struct DynamicMemory {
  static constexpr std::size_t kBytes = 227 * 1024;
  alignas(128) unsigned char bytes[kBytes];
  Cell cells[kBytes];
};
DynamicMemory& dynamic_memory();

}  // namespace emulation
