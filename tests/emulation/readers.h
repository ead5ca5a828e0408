// Sets of those who read an element since it was last written.
//
// Many elements have the same readers, so a set is a number: a reader, and the set without it. Sets
// that all threads know to be over are forgotten together, at a barrier of the block.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "shadow.h"

namespace emulation {

inline constexpr std::uint32_t kNoReaders = 0;

class Readers {
 public:
  // The set with the actor in it. Those whom it knows to be over need not be remembered beside it.
  std::uint32_t add(std::uint32_t set, const Actor& actor);
  // Whether the actor knows all of them to be over.
  [[nodiscard]] bool all_known(std::uint32_t set, const Actor& actor);
  // Nobody in any set needs to be remembered; agents do, unless all of them are over, too.
  void forget(bool agents_too);

 private:
  struct Node {
    Moment reader;
    std::uint32_t others;
  };
  struct Answer {
    std::uint32_t set = 0;
    Moment actor;
    std::uint32_t with = 0;
    bool known = false;
  };

  [[nodiscard]] bool is_old(std::uint32_t set) const { return set < first_; }
  [[nodiscard]] const Node& node(std::uint32_t set) const { return nodes_[set - first_]; }
  // From a table: the same question comes for element after element.
  const Answer& ask(std::uint32_t set, const Actor& actor);

  std::uint32_t first_ = 1;  // that is not forgotten
  bool has_agents_ = false;
  std::vector<Node> nodes_;
  std::array<Answer, 4096> answers_;
};

Readers& readers();

}  // namespace emulation
