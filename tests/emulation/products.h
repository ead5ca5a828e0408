// The products of a warpgroup that a thread has under way (PTX: wgmma and its groups).
//
// The emulator carries a product out when all of the warpgroup have come to it, but nobody knows of
// that before the wait that covers it: till then its operands are being read, by an agent that no
// thread knows to be done, and its sums are nobody's to touch.
#pragma once

#include <cstdint>
#include <source_location>
#include <vector>

#include "clock.h"

namespace emulation {

// Of a thread's sums, who may touch them.
struct SumsInUse {
  int products = 0;           // that are under way
  std::int64_t touched = -1;  // by the thread, after so many of its fences

  void touch(const std::source_location& where);
  void read(const std::source_location& where) const;
};

class AsyncProducts {
 public:
  void fence() { ++fences_; }
  // Adds to sums of its own shape or to sums that a fence has made ready.
  void start(SumsInUse& sums, const Moment& moment, const std::source_location& where);
  void commit() { ++groups_; }
  // All products of the committed groups but the `pending` newest are over.
  void wait(int pending);
  [[nodiscard]] std::int64_t fences() const { return fences_; }

 private:
  struct Product {
    SumsInUse* sums;
    Moment moment;
    std::int64_t group;
  };
  std::vector<Product> under_way_;  // oldest first
  std::int64_t groups_ = 0;         // committed
  std::int64_t fences_ = 0;
};

}  // namespace emulation
