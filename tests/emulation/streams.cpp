#include "streams.h"

#include <algorithm>

namespace emulation {

void Streams::set_schedule(Schedule schedule, std::uint64_t seed) {
  schedule_ = schedule;
  random_ = seed * 0x9E3779B97F4A7C15ull + 1;
}

Stream* Streams::create() {
  find(nullptr);  // the default stream is the first
  const auto spare = std::find_if(list_.begin(), list_.end(), [](auto& s) { return !s->alive; });
  if (spare != list_.end()) {
    (*spare)->alive = true;
    return spare->get();
  }
  list_.push_back(std::make_unique<Stream>());
  list_.back()->actor = static_cast<int>(list_.size());
  return list_.back().get();
}

void Streams::destroy(Stream* stream) {
  finish(stream);
  stream->alive = false;
}

Stream* Streams::find(void* handle) {
  if (list_.empty()) {
    list_.push_back(std::make_unique<Stream>());
    list_.back()->actor = 1;
  }
  if (handle == nullptr) return list_.front().get();
  const auto at = std::find_if(list_.begin(), list_.end(),
                               [&](auto& s) { return s->alive && s.get() == handle; });
  return at == list_.end() ? nullptr : at->get();
}

int Streams::alive() const {
  const auto count = std::count_if(list_.begin(), list_.end(), [](auto& s) { return s->alive; });
  return static_cast<int>(std::max(std::ptrdiff_t{0}, count - 1));  // the default one is no one's
}

Step Streams::step(Stream* stream) {
  const Step next{stream->actor, ++stream->time};
  stream->past.learn(host_);
  stream->past.learn(next);
  return next;
}

Step Streams::host_step() {
  const Step next{0, ++host_time_};
  host_.learn(next);
  return next;
}

void Streams::put(Stream* stream, std::function<void()> work) {
  stream->queue.push_back(std::move(work));
}

void Streams::one(Stream* stream) {
  const std::function<void()> work = std::move(stream->queue.front());
  stream->queue.pop_front();
  work();
  ++stream->done;
}

void Streams::move_on() {
  for (const auto& stream : list_) {
    if (schedule_ == Schedule::early) finish(stream.get());
    if (schedule_ != Schedule::drawn) continue;
    const std::uint64_t some = random() % (stream->queue.size() + 1);
    finish(stream.get(), stream->done + some);
  }
}

void Streams::finish(Stream* stream, std::uint64_t position) {
  while (stream->done < position) one(stream);
}

void Streams::record(Event& event, Stream* stream) {
  stream->past.learn(host_);
  auto record = std::make_shared<Record>();
  record->stream = stream;
  record->position = stream->position() + 1;
  record->past = stream->past;
  event.record = record;
  put(stream, [this, record] { record->clock = clock_; });
}

void Streams::wait(Stream* stream, const Event& event) {
  if (event.record == nullptr) return;
  stream->past.learn(event.record->past);
  put(stream, [this, record = event.record] { finish(record->stream, record->position); });
}

bool Streams::is_done(const Event& event) {
  return event.record == nullptr || event.record->stream->done >= event.record->position;
}

void Streams::learn(const Event& event) {
  if (event.record != nullptr) host_.learn(event.record->past);
}

void Streams::synchronize() {
  for (const auto& stream : list_) {
    finish(stream.get());
    host_.learn(stream->past);
  }
}

std::uint64_t Streams::random() {  // xorshift64*, Vigna 2016
  random_ ^= random_ >> 12;
  random_ ^= random_ << 25;
  random_ ^= random_ >> 27;
  return (random_ * 0x2545F4914F6CDD1Dull) >> 32;
}

}  // namespace emulation
