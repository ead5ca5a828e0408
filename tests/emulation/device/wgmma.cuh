// Twin of cuda/device/wgmma.cuh: finds the operands by their descriptors' bits, as the tables of
// the PTX document have them (wgmma_operand.h); what is under way, products.h. Sums are rounded as
// those of mma.cuh.
#pragma once

#include <array>
#include <cstdint>
#include <type_traits>

#include "agents.h"
#include "counters.h"
#include "device/shared.cuh"
#include "device/warpgroup.cuh"
#include "products.h"
#include "qlora_native/types.h"
#include "wgmma_operand.h"

namespace qlora::cuda {

inline constexpr int kWgmmaRows = 64;
inline constexpr int kWgmmaColumns = 256;
inline constexpr int kWgmmaDepth = 16;

inline constexpr int kSwizzledRow = 64;
inline constexpr int kSwizzledBytes = 1024;

struct MatrixDescriptor {
  std::uint64_t bits;
};

template <class T>
MatrixDescriptor describe_depth_along_rows(Shared<T> memory, int tile, int depth,
                                           const Where& where = Where::current()) {
  return {emulation::descriptor(memory.dynamic_address(tile + depth, where), 16, kSwizzledBytes)};
}

template <class T>
MatrixDescriptor describe_depth_across_rows(Shared<T> memory, int tile, int depth,
                                            int tile_elements,
                                            const Where& where = Where::current()) {
  return {emulation::descriptor(memory.dynamic_address(tile + depth * kSwizzledRow, where),
                                tile_elements * 2, kSwizzledBytes)};
}

class WgmmaSums {
 public:
  static constexpr int kValues = kWgmmaColumns / 2;

  [[nodiscard]] float get(int i, const Where& where = Where::current()) const {
    in_use.read(where);
    return value[i];
  }
  void set(int i, float sum, const Where& where = Where::current()) {
    in_use.touch(where);
    value[i] = sum;
  }

  float value[kValues];
  emulation::SumsInUse in_use;
};

inline void fence_products() { machine().thread().products.fence(); }
inline void commit_products() { machine().thread().products.commit(); }

template <int kPending>
void wait_products(WgmmaSums&) {
  machine().thread().products.wait(kPending);
}

namespace detail {

struct WgmmaOperands {
  WgmmaSums* sums;
  MatrixDescriptor a, b;
};

template <class T, bool kAcrossRows>
void multiply_warpgroup(const emulation::OperandsOfWarpgroup& threads, const Where& where) {
  static std::uint16_t bits[kWgmmaColumns * kWgmmaDepth];
  static float a[kWgmmaRows][kWgmmaDepth];
  static float b[kWgmmaDepth][kWgmmaColumns];
  static float d[kWgmmaRows][kWgmmaColumns];
  const auto of = [&](int thread) -> WgmmaOperands& {
    return *static_cast<WgmmaOperands*>(threads[static_cast<std::size_t>(thread)]);
  };
  for (int t = 1; t < kWarpgroupThreads; ++t) {
    if (of(t).a.bits != of(0).a.bits || of(t).b.bits != of(0).b.bits) {
      emulation::fault(emulation::FaultKind::warp, where, "descriptors differ among the threads");
    }
  }
  const auto value = [&](int row, int depth) {
    return to_float(T{bits[row * kWgmmaDepth + depth]});
  };
  const emulation::ReadingWarpgroup readers;
  emulation::counters().product(2 * kWgmmaRows * kWgmmaColumns * kWgmmaDepth);
  emulation::counters().operands(2 * (kWgmmaRows + kWgmmaColumns) * kWgmmaDepth);
  emulation::read_operand(of(0).a.bits, false, kWgmmaRows, false, readers, where, bits);
  for (int row = 0; row < kWgmmaRows; ++row) {
    for (int k = 0; k < kWgmmaDepth; ++k) a[row][k] = value(row, k);
  }
  emulation::read_operand(of(0).b.bits, kAcrossRows, kWgmmaColumns, true, readers, where, bits);
  for (int k = 0; k < kWgmmaDepth; ++k) {
    for (int column = 0; column < kWgmmaColumns; ++column) b[k][column] = value(column, k);
  }
  const auto each = [&](auto&& fn) {
    for (int t = 0; t < kWarpgroupThreads; ++t) {
      const int lane = t % kWarpSize;
      for (int i = 0; i < WgmmaSums::kValues; ++i) {
        const int row = t / kWarpSize * 16 + lane / 4 + i / 2 % 2 * 8;
        fn(of(t).sums->value[i], d[row][i / 4 * 8 + lane % 4 * 2 + i % 2]);
      }
    }
  };
  each([](const float& sum, float& of_tile) { of_tile = sum; });
  for (int row = 0; row < kWgmmaRows; ++row) {
    for (int k = 0; k < kWgmmaDepth; ++k) {
      for (int column = 0; column < kWgmmaColumns; ++column)
        d[row][column] += a[row][k] * b[k][column];
    }
  }
  each([](float& sum, const float& of_tile) { sum = of_tile; });
}

}  // namespace detail

template <class T, bool kAcrossRows>
void multiply_add(WgmmaSums& sums, MatrixDescriptor a, MatrixDescriptor b,
                  const Where& where = Where::current()) {
  static_assert(std::is_same_v<T, Float16> || std::is_same_v<T, BFloat16>);
  detail::WgmmaOperands operands{&sums, a, b};
  emulation::warpgroups().together("wgmma", &operands, &detail::multiply_warpgroup<T, kAcrossRows>,
                                   where);
  machine().thread().products.start(
      sums.in_use, emulation::latest_moment(emulation::tensor_core_of(warp_index())), where);
}

}  // namespace qlora::cuda
