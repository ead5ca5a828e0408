// What is known to be over, between the streams of a device and the host: a vector clock.
//
// Each stream is an actor, and so is the host, as number 0. Whatever it does next is a step of its
// own. Work on a stream knows the work that was put there before it, what the host knew when it put
// it there, and what the events that the stream waited for were recorded behind; the host knows
// what it waited for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace emulation {

struct Step {
  int actor = 0;
  std::uint64_t time = 0;
};

class Past {
 public:
  [[nodiscard]] bool knows(const Step& step) const {
    return index(step) < times_.size() && times_[index(step)] >= step.time;
  }
  void learn(const Step& step) {
    if (index(step) >= times_.size()) times_.resize(index(step) + 1);
    times_[index(step)] = std::max(times_[index(step)], step.time);
  }
  void learn(const Past& other) {
    if (other.times_.size() > times_.size()) times_.resize(other.times_.size());
    for (std::size_t i = 0; i < other.times_.size(); ++i) {
      times_[i] = std::max(times_[i], other.times_[i]);
    }
  }

 private:
  static std::size_t index(const Step& step) { return static_cast<std::size_t>(step.actor); }

  std::vector<std::uint64_t> times_;  // of each actor: up to there
};

}  // namespace emulation
