#include "wgmma_operand.h"

#include <cstring>
#include <string>

#include "agents.h"
#include "fault.h"
#include "machine.h"
#include "warpgroups.h"

namespace emulation {
namespace {

constexpr std::uint64_t kField = 0x3FFF;
constexpr std::uint64_t kSwizzle128 = std::uint64_t{1} << 62;
constexpr int kRowBytes = 128;
constexpr int kPieceBytes = 16;
constexpr int kPiece = 8;  // elements

struct Layout {
  int start, leading, stride;

  explicit Layout(std::uint64_t bits)
      : start(field(bits)), leading(field(bits >> 16)), stride(field(bits >> 32)) {}

 private:
  static int field(std::uint64_t bits) { return static_cast<int>(bits & kField) * kPieceBytes; }
};

constexpr int swizzled(int address) { return address ^ (address / kRowBytes % 8 * kPieceBytes); }

SharedBytes piece_at(int address, const std::source_location& where) {
  const auto end = static_cast<std::size_t>(address + kPieceBytes);
  if (end > Machine::instance().launch().dynamic_shared) {
    fault(FaultKind::out_of_bounds, where, "wgmma reads up to shared byte " + std::to_string(end));
  }
  DynamicMemory& memory = dynamic_memory();
  return {memory.bytes + address,
          kPieceBytes,
          memory.cells + address,
          kPieceBytes,
          address / 2,
          kPiece};
}

}  // namespace

std::uint64_t descriptor(std::uint32_t address, int leading_bytes, int stride_bytes) {
  const auto field = [](std::uint64_t bytes) { return bytes / kPieceBytes & kField; };
  return field(address) | field(static_cast<std::uint64_t>(leading_bytes)) << 16 |
         field(static_cast<std::uint64_t>(stride_bytes)) << 32 | kSwizzle128;
}

ReadingWarpgroup::ReadingWarpgroup() {
  Machine& machine = Machine::instance();
  const int first = machine.thread().index / kWarpgroupThreads * kWarpgroupThreads;
  for (int w = 0; w < 4; ++w) {
    const int lane_0 = first + w * kWarpSize;
    Clock& known = known_[index(w)];
    known = machine.thread_at(lane_0).knows.fenced;
    for (int t = lane_0 + 1; t < lane_0 + kWarpSize; ++t) {
      known.keep_common(machine.thread_at(t).knows.fenced);
    }
    moments_[index(w)] = next_moment(tensor_core_of(lane_0 / kWarpSize));
  }
}

void read_operand(std::uint64_t descriptor, bool depth_across_rows, int rows, bool by_all,
                  const ReadingWarpgroup& readers, const std::source_location& where,
                  std::uint16_t* out) {
  const Layout at(descriptor);
  const auto read = [&](int address, int row) {
    const SharedBytes piece = piece_at(swizzled(address), where);
    for (int w = 0; w < 4; ++w) {
      if (by_all || w == row / 16) note_read(piece, readers.warp(w), where);
    }
    std::array<std::uint16_t, kPiece> values;
    std::memcpy(values.data(), piece.bytes, sizeof values);
    return values;
  };
  if (depth_across_rows) {
    for (int depth = 0; depth < kOperandDepth; ++depth) {
      for (int row = 0; row < rows; row += kPiece) {
        const auto values = read(at.start + row / 64 * at.leading + row % 64 * 2 +
                                     depth / 8 * at.stride + depth % 8 * kRowBytes,
                                 row);
        for (int i = 0; i < kPiece; ++i) {
          out[(row + i) * kOperandDepth + depth] = values[static_cast<std::size_t>(i)];
        }
      }
    }
    return;
  }
  for (int row = 0; row < rows; ++row) {
    for (int depth = 0; depth < kOperandDepth; depth += kPiece) {
      const auto values =
          read(at.start + row / 8 * at.stride + row % 8 * kRowBytes + depth * 2, row);
      std::memcpy(out + row * kOperandDepth + depth, values.data(), sizeof values);
    }
  }
}

}  // namespace emulation
