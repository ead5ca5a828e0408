// Counts what a launch moves: global bytes and 32-byte sectors, shared-memory accesses and bank
// conflicts, a warp's instruction at a time.
//
// Threads run one after another here, so a warp's instruction is put together again: the k-th time
// that a lane comes by a place in the source belongs with the k-th time that the others do. (Where
// lanes take loops a different number of times, this may match accesses that a GPU would not.)
// Off by default: it costs several times the run.
#pragma once

#include <cstdint>
#include <map>
#include <source_location>
#include <tuple>
#include <vector>

namespace emulation {

struct Counts {
  std::int64_t loaded_bytes = 0;    // from global memory, by all threads
  std::int64_t loaded_sectors = 0;  // of 32 bytes, distinct within a warp's instruction
  std::int64_t stored_bytes = 0;
  std::int64_t stored_sectors = 0;
  std::int64_t global_instructions = 0;  // of warps
  std::int64_t shared_instructions = 0;  // of warps
  std::int64_t shared_passes = 0;        // over the banks, 128 bytes at most each
  // Those beyond what the width of the access asks for.
  std::int64_t bank_conflicts = 0;
  std::int64_t tensor_flops = 0;  // of mma.sync and wgmma: a multiplication and an addition are two
};

class Counters {
 public:
  void enable(bool on) { enabled_ = on; }
  void reset() { counts_ = {}; }
  [[nodiscard]] const Counts& counts() const { return counts_; }

  void load(std::uintptr_t address, int bytes, const std::source_location& where) {
    if (enabled_) note(Kind::load, address, bytes, where);
  }
  void store(std::uintptr_t address, int bytes, const std::source_location& where) {
    if (enabled_) note(Kind::store, address, bytes, where);
  }
  // `offset` from the start of an array, which begins at bank 0.
  void shared(std::uintptr_t offset, int bytes, const std::source_location& where) {
    if (enabled_) note(Kind::shared, offset, bytes, where);
  }
  // What wgmma reads of shared memory, at 128 bytes a pass.
  void operands(std::int64_t bytes) {
    if (enabled_) counts_.shared_passes += bytes / 128;
  }
  // Once a warp's instruction, or a warpgroup's.
  void product(std::int64_t flops) {
    if (enabled_) counts_.tensor_flops += flops;
  }
  void end_block();

 private:
  enum class Kind : std::uint8_t { load, store, shared };
  struct Access {
    std::uintptr_t address;
    int bytes;
    int lane;
  };
  using Place = std::tuple<const char*, unsigned, unsigned, Kind>;  // file, line, column
  using Instruction = std::tuple<int, Place, std::uint32_t>;        // warp, place, k-th time

  void note(Kind kind, std::uintptr_t address, int bytes, const std::source_location& where);
  void add(Kind kind, const std::vector<Access>& lanes);

  bool enabled_ = false;
  Counts counts_;
  std::map<std::tuple<int, Place>, std::uint32_t> times_;  // of a thread at a place
  std::map<Instruction, std::vector<Access>> instructions_;
};

Counters& counters();

}  // namespace emulation
