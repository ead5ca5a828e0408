#include "readers.h"

namespace emulation {
namespace {

// Looked through for a reader that is in the set already. Where many read an element again and
// again, one may come to stand in it twice.
constexpr int kSearched = 32;

}  // namespace

Readers& readers() {
  static Readers readers;
  return readers;
}

const Readers::Answer& Readers::ask(std::uint32_t set, const Actor& actor) {
  const auto key = set * 31 + static_cast<std::uint32_t>(actor.now.actor) * 517;
  Answer& answer = answers_[key % answers_.size()];
  if (answer.set == set && answer.actor == actor.now) return answer;
  bool known = true;
  bool contained = false;
  int steps = 0;
  for (std::uint32_t s = set; !is_old(s) && (known || !contained); s = node(s).others) {
    known = known && actor.clock.knows(node(s).reader);
    contained = contained || node(s).reader == actor.now;
    if (!known && ++steps == kSearched) break;
  }
  std::uint32_t with = set;
  if (!contained) {
    nodes_.push_back({actor.now, known ? kNoReaders : set});
    with = first_ + static_cast<std::uint32_t>(nodes_.size()) - 1;
    has_agents_ |= actor.now.actor >= kMaxBlockThreads;
  }
  answer = {set, actor.now, with, known};
  return answer;
}

std::uint32_t Readers::add(std::uint32_t set, const Actor& actor) {
  if (!is_old(set) && node(set).reader == actor.now) return set;
  return ask(is_old(set) ? kNoReaders : set, actor).with;
}

bool Readers::all_known(std::uint32_t set, const Actor& actor) {
  if (is_old(set)) return true;
  const Node& last = node(set);
  if (is_old(last.others)) return actor.clock.knows(last.reader);
  return ask(set, actor).known;
}

void Readers::forget(bool agents_too) {
  if (has_agents_ && !agents_too) return;
  has_agents_ = false;
  first_ += static_cast<std::uint32_t>(nodes_.size());
  nodes_.clear();
}

}  // namespace emulation
