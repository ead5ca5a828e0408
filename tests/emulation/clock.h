// What is known to have happened, in a block of threads.
//
// Every thread counts its time, which goes on whenever it hands on what it knows or learns
// something: a moment is an actor and its time. A clock holds, for each actor, the latest moment
// that is known to be over. An access is ordered before another if the second's actor knew its
// moment. A barrier is a clock that all give to and all take from; whatever else orders memory (a
// barrier of a warp, an mbarrier) is one, too, of fewer threads.
//
// Actors are the threads of the block and, behind them, agents: what works on its own when a thread
// told it to (an asynchronous copy engine). A barrier of the block makes all of the threads' past
// known, but none of the agents': their times lie above all of the threads'.
//
// What threads start in the asynchronous proxy (bulk copies, wgmma) sees their loads and stores
// only from a proxy fence on: so a thread knows things twice, for its own accesses and for those.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

namespace emulation {

inline constexpr int kMaxBlockThreads = 1024;
inline constexpr int kAgents = 40;  // agents.h
inline constexpr std::uint32_t kFirstAgentTime = std::uint32_t{1} << 31;

struct Moment {
  int actor = 0;
  std::uint32_t time = 0;

  friend bool operator==(const Moment&, const Moment&) = default;
};

class Clock {
 public:
  [[nodiscard]] bool knows(const Moment& moment) const {
    return moment.time <= floor_ || (moment.actor >= first_ && moment.actor < last_ &&
                                     moment.time <= time_[index(moment.actor)]);
  }
  void learn(const Moment& moment) {
    extend(moment.actor, moment.actor + 1);
    std::uint32_t& time = time_[index(moment.actor)];
    time = std::max(time, moment.time);
  }
  void learn(const Clock& other) {
    floor_ = std::max(floor_, other.floor_);
    if (other.first_ >= other.last_) return;
    extend(other.first_, other.last_);
    for (int a = other.first_; a < other.last_; ++a) {
      time_[index(a)] = std::max(time_[index(a)], other.time_[index(a)]);
    }
  }
  // Only what the other one knows, too.
  void keep_common(const Clock& other) {
    extend(other.first_, other.last_);
    for (int a = first_; a < last_; ++a) {
      time_[index(a)] = std::min(time_of(a), other.time_of(a));
    }
    floor_ = std::min(floor_, other.floor_);
  }
  // All threads up to that time are known.
  void settle(std::uint32_t floor) {
    floor_ = floor;
    first_ = std::max(first_, kMaxBlockThreads);
    if (first_ >= last_) first_ = last_ = 0;
  }

 private:
  static std::size_t index(int actor) { return static_cast<std::size_t>(actor); }
  [[nodiscard]] std::uint32_t time_of(int actor) const {
    if (actor < first_ || actor >= last_) return floor_;
    return std::max(floor_, time_[index(actor)]);
  }
  void extend(int first, int last) {
    if (first >= last) return;
    if (first_ >= last_) {
      clear(first, last);
      first_ = first;
      last_ = last;
      return;
    }
    if (first < first_) clear(first, first_);
    if (last > last_) clear(last_, last);
    first_ = std::min(first_, first);
    last_ = std::max(last_, last);
  }
  void clear(int first, int last) {
    std::fill(time_.begin() + first, time_.begin() + last, std::uint32_t{0});
  }

  std::uint32_t floor_ = 0;  // of all threads
  int first_ = 0;            // of the actors of whom more than that is known
  int last_ = 0;
  std::array<std::uint32_t, kMaxBlockThreads + kAgents> time_;
};

struct Knowledge {
  Clock own;     // for the actor's loads and stores
  Clock fenced;  // for what it starts in the asynchronous proxy

  void learn(const Knowledge& other) {
    own.learn(other.own);
    fenced.learn(other.fenced);
  }
  // Something that went on in the asynchronous proxy is over: needs no fence.
  void learn(const Moment& of_agent) {
    own.learn(of_agent);
    fenced.learn(of_agent);
  }
  void fence() { fenced.learn(own); }
  void settle(std::uint32_t floor) {
    own.settle(floor);
    fenced.settle(floor);
  }
};

}  // namespace emulation
