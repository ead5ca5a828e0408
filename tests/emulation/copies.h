// The asynchronous copies that a thread has under way (PTX: cp.async and its groups).
//
// A copy takes its bytes from global memory when it starts and gives them to shared memory at the
// wait that covers it. Between the two, its destination holds a poison and belongs to nobody:
// whoever reads or writes it then, the thread itself included, is at fault.
#pragma once

#include <array>
#include <cstdint>
#include <source_location>
#include <vector>

#include "shadow.h"

namespace emulation {

inline constexpr int kPoison = 0xFF;  // a byte of it: NaN in every floating-point type

class AsyncCopies {
 public:
  static constexpr int kMostBytes = 16;

  // `source` has as many bytes as the destination.
  void start(const SharedBytes& to, const void* source, const std::source_location& where);
  void commit() { ++groups_; }
  // All copies of the committed groups but the `pending` newest arrive.
  void wait(int pending);

 private:
  struct Copy {
    SharedBytes to;
    std::array<unsigned char, kMostBytes> bytes;
    std::int64_t group;
  };
  std::vector<Copy> under_way_;  // oldest first
  std::int64_t groups_ = 0;      // committed
};

}  // namespace emulation
