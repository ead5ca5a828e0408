// Places in a piece of device memory, for ranges of any size.
//
// What is given back is free behind the marks that it is given back with: until then a copy out of
// it, or a kernel, goes on. Free pieces are therefore kept apart, each with its own, and of all
// places where a range fits it takes the one that was given back longest ago: while a copy out of
// one place goes on, the copy in that comes next goes to another.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <vector>

#include "paging/marks.h"

namespace qlora::cuda {

class Window {
 public:
  // All of it is free.
  void reset(std::int64_t bytes);

  // The offset of a free place, and what work on it has to wait for. None: nothing of that size is
  // free in one piece.
  std::optional<std::int64_t> take(std::int64_t bytes, std::vector<Mark>* after);
  void give(std::int64_t offset, std::int64_t bytes, std::vector<Mark> after);

 private:
  struct Piece {
    std::int64_t bytes = 0;
    std::uint64_t given = 0;  // when, among all
    std::vector<Mark> after;
  };
  using Pieces = std::map<std::int64_t, Piece>;  // by offset

  // When the last of the pieces that hold `bytes` from there on was given back.
  [[nodiscard]] std::optional<std::uint64_t> given_at(Pieces::const_iterator first,
                                                      std::int64_t bytes) const;

  Pieces free_;
  std::uint64_t given_ = 0;
};

}  // namespace qlora::cuda
