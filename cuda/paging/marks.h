// Points in a stream's work that other streams wait for.
#pragma once

#include <memory>
#include <vector>

#include "device/stream.cuh"
#include "qlora_native/status.h"

namespace qlora::cuda {

// An event that was recorded; null: a point that is past. When nobody waits for it any more, its
// event is free for another.
using Mark = std::shared_ptr<void>;

// Events that were made and are not in use.
class Marks {
 public:
  explicit Marks(bool timed) : spare_(std::make_shared<Spare>(timed)) {}

  // All that is on the stream now.
  Status record(void* stream, Mark* mark) {
    void* event = nullptr;
    if (!spare_->events.empty()) {
      event = spare_->events.back();
      spare_->events.pop_back();
    } else if (const Status status = create_event(&event, spare_->timed); !status.ok()) {
      return status;
    }
    *mark = Mark(event, [spare = spare_](void* unused) { spare->events.push_back(unused); });
    return record_event(event, stream);
  }

 private:
  struct Spare {
    explicit Spare(bool has_time) : timed(has_time) {}
    ~Spare() {
      for (void* event : events) destroy_event(event);
    }
    Spare(const Spare&) = delete;
    Spare& operator=(const Spare&) = delete;

    bool timed;
    std::vector<void*> events;
  };

  std::shared_ptr<Spare> spare_;
};

inline Status wait(void* stream, const Mark& mark) {
  return mark == nullptr ? Status{} : wait_event(stream, mark.get());
}

// Forgets a mark that is past.
inline Status forget_past(Mark* mark) {
  if (*mark == nullptr) return {};
  bool past = false;
  const Status status = is_done(mark->get(), &past);
  if (past) mark->reset();
  return status;
}

}  // namespace qlora::cuda
