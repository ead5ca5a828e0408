#include <algorithm>
#include <iterator>
#include <utility>

#include "device/memory.cuh"
#include "device/stream.cuh"
#include "paging/device_buffer.h"

namespace qlora::cuda {
namespace {

constexpr Status kNoRoom{
    StatusCode::out_of_memory,
    "there is no room on the device for a range beside those that are acquired: the window is too "
    "small, or the device's memory is full"};
constexpr Status kOverlaps{StatusCode::invalid_argument,
                           "a range must be named as it was when it was brought, or be apart from "
                           "all that are present"};
constexpr Status kNotAcquired{StatusCode::invalid_argument,
                              "release needs a range that is acquired"};
constexpr Status kStillAcquired{StatusCode::invalid_argument,
                                "host_view needs all ranges to be released"};
constexpr Status kCaptured{StatusCode::unsupported,
                           "a step with paged state cannot be captured in a CUDA graph: which "
                           "copies it needs depends on what is present"};

bool meet(std::int64_t begin, std::int64_t bytes, std::int64_t other, std::int64_t other_bytes) {
  return begin < other + other_bytes && other < begin + bytes;
}

Status runs_now(void* stream) {
  bool captured = false;
  const Status status = is_captured(stream, &captured);
  return status.ok() && captured ? kCaptured : status;
}

}  // namespace

DeviceBuffer::~DeviceBuffer() {
  static_cast<void>(synchronize_device());  // work of any stream may use what is still acquired
}

Status DeviceBuffer::open(const PagedParams& params) {
  params_ = params;
  counts_.bytes = params.bytes;
  if (const Status status = SideStreams::of(params.device, &streams_); !status.ok()) return status;
  return carrier_->open(params);
}

// The stream's work so far. Where there is no event for it, it is waited for: then it is past.
Status DeviceBuffer::mark(void* stream, Mark* mark) {
  if (marks_.record(stream, mark).ok()) return {};
  mark->reset();
  return synchronize_stream(stream);
}

// ---- what is present ----

// The range that is present and so named, or the end; what overlaps it otherwise is an error.
Status DeviceBuffer::find(std::int64_t begin, std::int64_t bytes, Ranges::iterator* found) {
  auto at = present_.upper_bound(begin);
  if (at != present_.begin() &&
      meet(begin, bytes, std::prev(at)->first, std::prev(at)->second.bytes)) {
    --at;
  }
  *found = present_.end();
  if (at == present_.end() || !meet(begin, bytes, at->first, at->second.bytes)) return {};
  if (at->first != begin || at->second.bytes != bytes) return kOverlaps;
  *found = at;
  return {};
}

Status DeviceBuffer::arriving(std::int64_t* bytes) {
  *bytes = 0;
  for (auto& [begin, range] : present_) {
    if (const Status status = forget_past(&range.arrived); !status.ok()) return status;
    if (range.arrived != nullptr) *bytes += range.bytes;
  }
  return {};
}

bool DeviceBuffer::anything_acquired() const {
  return std::any_of(present_.begin(), present_.end(),
                     [](const auto& range) { return range.second.acquired > 0; });
}

Status DeviceBuffer::forget_departures() {
  while (!departing_.empty()) {
    if (const Status status = forget_past(&departing_.front().left); !status.ok()) return status;
    if (departing_.front().left != nullptr) break;
    departing_.pop_front();
  }
  return {};
}

// ---- in and out ----

Status DeviceBuffer::bring(std::int64_t begin, std::int64_t bytes, bool* made) {
  *made = false;
  std::int64_t on_the_way = 0;
  if (const Status status = arriving(&on_the_way); !status.ok()) return status;
  if (const Status status = forget_departures(); !status.ok()) return status;
  Range range;
  range.bytes = bytes;
  range.time = ++time_;
  std::vector<Mark> after;
  Status status = carrier_->take(begin, bytes, on_the_way, &range.address, &after);
  if (!status.ok() || range.address == nullptr) return status;
  void* const incoming = streams_->incoming;
  for (const Mark& mark : after) {
    if (status.ok()) status = wait(incoming, mark);
  }
  for (const Departure& departure : departing_) {
    if (status.ok() && meet(begin, bytes, departure.begin, departure.bytes)) {
      status = wait(incoming, departure.left);
    }
  }
  if (status.ok()) status = carrier_->to_device(begin, bytes, range.address, incoming);
  if (status.ok()) status = mark(incoming, &range.arrived);
  if (!status.ok()) {
    carrier_->withdraw(range.address, bytes, std::move(after));
    return status;
  }
  counts_.moved_in += bytes;
  present_.emplace(begin, std::move(range));
  *made = true;
  return {};
}

// Lets a range go behind that mark and its last use. If it fails, the range is present as before.
Status DeviceBuffer::send(Ranges::iterator at, const Mark& behind) {
  auto& [begin, range] = *at;
  if (!carrier_->moves(range.modified)) {
    carrier_->give(range.address, range.bytes, {range.arrived, range.used, behind});
    present_.erase(at);
    return {};
  }
  void* const outgoing = streams_->outgoing;
  Status status;
  for (const Mark& mark : {range.arrived, range.used, behind}) {
    if (status.ok()) status = wait(outgoing, mark);
  }
  if (status.ok()) status = carrier_->to_host(begin, range.bytes, range.address, outgoing);
  Mark left;
  if (status.ok()) status = mark(outgoing, &left);
  if (!status.ok()) return status;
  counts_.moved_out += range.bytes;
  departing_.push_back({begin, range.bytes, left});
  carrier_->give(range.address, range.bytes, {left});
  present_.erase(at);
  return {};
}

// Makes room: of what is not acquired, what was longest ago.
Status DeviceBuffer::send_oldest() {
  auto oldest = present_.end();
  for (auto at = present_.begin(); at != present_.end(); ++at) {
    if (at->second.acquired > 0) continue;
    if (oldest == present_.end() || at->second.time < oldest->second.time) oldest = at;
  }
  return oldest == present_.end() ? kNoRoom : send(oldest, nullptr);
}

// ---- the time that the step's stream stood still ----

Status DeviceBuffer::timed_wait(void* stream, const Mark& mark) {
  Wait timed;
  Status status = timed_marks_.record(stream, &timed.from);
  if (status.ok()) status = wait(stream, mark);
  if (status.ok()) status = timed_marks_.record(stream, &timed.to);
  if (status.ok()) waits_.push_back(std::move(timed));
  return status;
}

Status DeviceBuffer::add_up_waits() {
  while (!waits_.empty()) {
    bool done = false;
    Status status = is_done(waits_.front().to.get(), &done);
    if (!status.ok() || !done) return status;
    std::int64_t ns = 0;
    status = elapsed_ns(waits_.front().from.get(), waits_.front().to.get(), &ns);
    if (!status.ok()) return status;
    counts_.waited_ns += ns;
    waits_.pop_front();
  }
  return {};
}

// ---- a Pager's functions ----

Status DeviceBuffer::prefetch(std::int64_t begin, std::int64_t bytes, void* stream) {
  if (const Status status = runs_now(stream); !status.ok()) return status;
  Ranges::iterator at;
  if (const Status status = find(begin, bytes, &at); !status.ok()) return status;
  if (at != present_.end()) return {};
  bool made = false;
  return bring(begin, bytes, &made);
}

Status DeviceBuffer::acquire(std::int64_t begin, std::int64_t bytes, void* stream, void** address) {
  if (const Status status = runs_now(stream); !status.ok()) return status;
  if (const Status status = add_up_waits(); !status.ok()) return status;
  Ranges::iterator at;
  if (const Status status = find(begin, bytes, &at); !status.ok()) return status;
  for (bool made = at != present_.end(); !made;) {
    if (const Status status = bring(begin, bytes, &made); !status.ok()) return status;
    if (made) {
      at = present_.find(begin);
    } else if (const Status status = send_oldest(); !status.ok()) {
      return status;
    }
  }
  Range& range = at->second;
  if (const Status status = forget_past(&range.arrived); !status.ok()) return status;
  if (range.arrived != nullptr) {
    if (const Status status = timed_wait(stream, range.arrived); !status.ok()) return status;
  }
  if (const Status status = wait(stream, range.used); !status.ok()) return status;
  ++range.acquired;
  *address = range.address;
  return {};
}

Status DeviceBuffer::release(std::int64_t begin, std::int64_t bytes, void* stream, bool modified) {
  Ranges::iterator at;
  if (const Status status = find(begin, bytes, &at); !status.ok()) return status;
  if (at == present_.end() || at->second.acquired == 0) return kNotAcquired;
  Range& range = at->second;
  range.modified |= modified;
  // Behind what others did on streams of theirs.
  if (const Status status = wait(stream, range.used); !status.ok()) return status;
  if (const Status status = mark(stream, &range.used); !status.ok()) return status;
  range.time = ++time_;
  --range.acquired;
  return {};
}

Status DeviceBuffer::evict(std::int64_t begin, std::int64_t bytes, void* stream) {
  Mark behind;
  for (auto at = present_.lower_bound(begin); at != present_.end();) {
    const auto here = at++;
    if (here->first + here->second.bytes > begin + bytes) break;
    if (here->second.acquired > 0) continue;
    if (behind == nullptr) {
      if (const Status status = mark(stream, &behind); !status.ok()) return status;
    }
    if (const Status status = send(here, behind); !status.ok()) return status;
  }
  return {};
}

Status DeviceBuffer::host_view(void** address) {
  if (anything_acquired()) return kStillAcquired;
  while (!present_.empty()) {
    if (const Status status = send(present_.begin(), nullptr); !status.ok()) return status;
  }
  for (void* stream : {streams_->incoming, streams_->outgoing}) {
    if (const Status status = synchronize_stream(stream); !status.ok()) return status;
  }
  departing_.clear();
  *address = carrier_->host();
  return host_uses(carrier_->host(), params_.bytes);
}

Status DeviceBuffer::settle() {
  if (!present_.empty()) {
    if (const Status status = synchronize_stream(streams_->outgoing); !status.ok()) return status;
  } else {  // kernels that only read what left may still do so
    if (const Status status = synchronize_device(); !status.ok()) return status;
    carrier_->give_back();
  }
  departing_.clear();
  return {};
}

Status DeviceBuffer::stats(PagedStats* stats) {
  if (const Status status = add_up_waits(); !status.ok()) return status;
  if (const Status status = forget_departures(); !status.ok()) return status;
  *stats = counts_;
  for (const auto& [begin, range] : present_) stats->resident += range.bytes;
  for (const Departure& departure : departing_) stats->resident += departure.bytes;
  return {};
}

}  // namespace qlora::cuda
