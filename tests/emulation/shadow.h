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
  bool atomic = false;  // the last write
};

void note_read(Cell& cell, std::ptrdiff_t index, const std::source_location& where);
void note_write(Cell& cell, std::ptrdiff_t index, const std::source_location& where);
void note_atomic(Cell& cell, std::ptrdiff_t index, const std::source_location& where);

// The block's dynamic shared memory, a cell for each byte.
struct DynamicMemory {
  static constexpr std::size_t kBytes = 227 * 1024;
  alignas(128) unsigned char bytes[kBytes];
  Cell cells[kBytes];
};
DynamicMemory& dynamic_memory();

}  // namespace emulation
