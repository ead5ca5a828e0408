// A paged buffer of a GPU: which ranges are in its memory, and what waits for what.
//
//   step's stream   ── work on i-1 ─┬─ wait ── work on i ──┬─ wait ── work on i+1 ──
//                             used  │   ▲         arrived  │   ▲
//   incoming        ── bring i ─────┼───┘── wait ── bring i+1 ─┘
//                                   ▼         ▲ left: the place of i-2 is free
//   outgoing        ── send i-2 ────┴── send i-1 ── …
//
// The host waits for nothing of it: each arrow is an event. Bringing a range waits for whatever was
// in its place to have left, and for the range itself to have left if it does so just now. All
// buffers of a device share its two side streams.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "paging/carrier.h"
#include "paging/marks.h"
#include "paging/side_streams.h"
#include "qlora_native/paging.h"

namespace qlora::cuda {

class DeviceBuffer : public PagedBuffer {
 public:
  explicit DeviceBuffer(std::unique_ptr<Carrier> carrier) : carrier_(std::move(carrier)) {}
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  ~DeviceBuffer();

  [[nodiscard]] int device() const { return params_.device; }

  // The functions of a Pager.
  Status open(const PagedParams& params);
  Status host_view(void** address);
  Status prefetch(std::int64_t begin, std::int64_t bytes, void* stream);
  Status acquire(std::int64_t begin, std::int64_t bytes, void* stream, void** address);
  Status release(std::int64_t begin, std::int64_t bytes, void* stream, bool modified);
  Status evict(std::int64_t begin, std::int64_t bytes, void* stream);
  Status settle();
  Status stats(PagedStats* stats);

 private:
  struct Range {
    std::int64_t bytes = 0;
    char* address = nullptr;
    Mark arrived;      // null: known to be there
    Mark used;         // the work on it, up to its last release
    int acquired = 0;  // times, and not released
    bool modified = false;
    std::uint64_t time = 0;  // of its release, or prefetch, among all
  };
  using Ranges = std::map<std::int64_t, Range>;  // by begin
  struct Departure {
    std::int64_t begin, bytes;
    Mark left;
  };
  struct Wait {
    Mark from, to;  // timed
  };

  Status find(std::int64_t begin, std::int64_t bytes, Ranges::iterator* found);
  // `made`: whether there was room.
  Status bring(std::int64_t begin, std::int64_t bytes, bool* made);
  Status send(Ranges::iterator range, const Mark& behind);
  Status send_oldest();
  Status mark(void* stream, Mark* mark);
  Status timed_wait(void* stream, const Mark& mark);
  Status add_up_waits();
  Status arriving(std::int64_t* bytes);
  Status forget_departures();
  [[nodiscard]] bool anything_acquired() const;

  PagedParams params_;
  std::unique_ptr<Carrier> carrier_;
  std::shared_ptr<SideStreams> streams_;
  Marks marks_{false};
  Marks timed_marks_{true};
  Ranges present_;
  std::deque<Departure> departing_;  // oldest first
  std::deque<Wait> waits_;           // likewise
  PagedStats counts_;
  std::uint64_t time_ = 0;
};

}  // namespace qlora::cuda
