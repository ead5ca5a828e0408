// Streams and events: work that was put there, and when it is done.
//
// A kernel runs when it is launched, and before it everything that it has to wait for; all else
// waits in its stream's queue, and is done as early, as late or at as random a time as its order
// allows: the Schedule. The order itself, which is the same under each, is kept as what every
// stream knows (past.h).
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "past.h"

namespace emulation {

struct Stream;

// What an event stands for since it was recorded.
struct Record {
  Stream* stream = nullptr;
  std::uint64_t position = 0;  // done when this much of the stream is
  Past past;
  std::int64_t clock = 0;  // when it was done
};

struct Event {
  bool timed = false;
  std::shared_ptr<Record> record;
};

struct Stream {
  int actor = 0;
  bool alive = true;
  std::uint64_t time = 0;
  Past past;
  std::uint64_t done = 0;  // of all that was ever put here
  std::deque<std::function<void()>> queue;

  [[nodiscard]] std::uint64_t position() const { return done + queue.size(); }
};

class Streams {
 public:
  enum class Schedule { early, late, drawn };

  // `drawn`: from a seed.
  void set_schedule(Schedule schedule, std::uint64_t seed);

  Stream* create();
  void destroy(Stream* stream);
  // Null is the default stream.
  Stream* find(void* handle);
  [[nodiscard]] int alive() const;

  // The next step of the stream's, or of the host's, and what it knows.
  Step step(Stream* stream);
  Step host_step();
  [[nodiscard]] const Past& host() const { return host_; }

  void put(Stream* stream, std::function<void()> work);
  // As much as the schedule does by itself at any time.
  void move_on();
  // All that is on the stream, or up to there, and what that waits for.
  void finish(Stream* stream, std::uint64_t position);
  void finish(Stream* stream) { finish(stream, stream->position()); }

  void record(Event& event, Stream* stream);
  void wait(Stream* stream, const Event& event);
  // Of an event that was never recorded: it is done.
  [[nodiscard]] static bool is_done(const Event& event);
  // The host knows that it is.
  void learn(const Event& event);
  void learn_all(Stream* stream) { host_.learn(stream->past); }
  void synchronize();  // all streams

  // Nanoseconds, of which a copy takes one a byte.
  void spend(std::int64_t ns) { clock_ += ns; }

 private:
  static void one(Stream* stream);
  std::uint64_t random();

  std::vector<std::unique_ptr<Stream>> list_;  // never shorter: records point there
  Past host_;
  std::uint64_t host_time_ = 0;
  std::int64_t clock_ = 0;
  Schedule schedule_ = Schedule::early;
  std::uint64_t random_ = 1;
};

}  // namespace emulation
