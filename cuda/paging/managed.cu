// The pager "managed": memory with one address for host and device, at home with the host. A range
// is moved to the device before it is needed and back behind its use, all of it at once; where none
// was moved, a kernel would read over the link, page by page.
//
// Limited by the link, and by the driver's work for each page: none of it has been measured.
//
// It never has more on the device than is free there, so that the driver drives out nothing by
// itself; nor, unless it is asked to (`oversubscribe`), more in all than is free when it is opened.
#include <algorithm>
#include <cstring>
#include <deque>
#include <utility>
#include <vector>

#include "device/memory.cuh"
#include "paging/carrier.h"
#include "paging/pagers.h"
#include "paging/table.h"

namespace qlora::cuda {
namespace {

// Of the host: what a prefetch is rounded to. And the largest of the device, which a range may
// share at either end.
constexpr std::int64_t kPage = 4096;
constexpr std::int64_t kLargePage = 2 << 20;

class ManagedCarrier final : public Carrier {
 public:
  ~ManagedCarrier() override {
    if (memory_ != nullptr) free_managed(memory_);
  }

  Status open(const PagedParams& params) override;

  [[nodiscard]] char* host() const override { return static_cast<char*>(memory_); }

  Status take(std::int64_t begin, std::int64_t bytes, std::int64_t arriving, char** address,
              std::vector<Mark>* after) override;

  void give(char*, std::int64_t bytes, std::vector<Mark> after) override {
    present_ -= bytes;
    leaving_.push_back({bytes, std::move(after)});
  }

  // Others leave as before.
  void withdraw(char*, std::int64_t bytes, std::vector<Mark>) override { present_ -= bytes; }

  Status to_device(std::int64_t, std::int64_t bytes, char* address, void* stream) override {
    return prefetch_to_device(address, bytes, device_, stream);
  }

  [[nodiscard]] bool moves(bool) const override { return true; }

  // The pages that it has to itself: one at either end may be another's.
  Status to_host(std::int64_t begin, std::int64_t bytes, const char*, void* stream) override {
    const std::int64_t first = (begin + kPage - 1) / kPage * kPage;
    const std::int64_t end = begin + bytes == bytes_ ? bytes_ : (begin + bytes) / kPage * kPage;
    if (end <= first) return {};
    return prefetch_to_host(host() + first, end - first, stream);
  }

  void give_back() override {}

 private:
  Status forget_what_left();

  void* memory_ = nullptr;
  std::int64_t bytes_ = 0;
  std::int64_t window_bytes_ = 0;  // 0: no bound but what is free
  std::int64_t present_ = 0;
  int device_ = 0;
  struct Leaving {
    std::int64_t bytes;
    std::vector<Mark> after;
  };
  std::deque<Leaving> leaving_;  // oldest first
};

Status supports(int device) {
  const DeviceGuard guard(device);
  if (!guard.status().ok()) return guard.status();
  int concurrent = 0;
  const Status status = concurrent_managed_access(&concurrent);
  if (status.ok() && concurrent == 0) {
    return {StatusCode::unsupported,
            "this device and system cannot move managed memory while kernels run (no concurrent "
            "managed access: Windows, WSL and some virtual machines)"};
  }
  return status;
}

// Room is what is free now, in the window and on the device, and, behind their marks, what others
// leave: the oldest first.
Status ManagedCarrier::take(std::int64_t begin, std::int64_t bytes, std::int64_t arriving,
                            char** address, std::vector<Mark>* after) {
  *address = nullptr;
  std::int64_t free = 0, total = 0;
  if (const Status status = device_memory(&free, &total); !status.ok()) return status;
  if (const Status status = forget_what_left(); !status.ok()) return status;
  std::int64_t room = free - arriving - std::min(2 * kLargePage, total / 64);
  if (window_bytes_ > 0) {
    std::int64_t taken = present_;
    for (const Leaving& each : leaving_) taken += each.bytes;
    room = std::min(room, window_bytes_ - taken);
  }
  for (const Leaving& each : leaving_) {
    if (room >= bytes) break;
    room += each.bytes;
    after->insert(after->end(), each.after.begin(), each.after.end());
  }
  if (room < bytes) return {};
  present_ += bytes;
  *address = host() + begin;
  return {};
}

Status ManagedCarrier::forget_what_left() {
  for (; !leaving_.empty(); leaving_.pop_front()) {
    for (Mark& mark : leaving_.front().after) {
      if (const Status status = forget_past(&mark); !status.ok() || mark != nullptr) return status;
    }
  }
  return {};
}

Status ManagedCarrier::open(const PagedParams& params) {
  if (const Status status = supports(params.device); !status.ok()) return status;
  std::int64_t free = 0, total = 0;
  if (const Status status = device_memory(&free, &total); !status.ok()) return status;
  if (params.bytes > free && !params.oversubscribe) {
    return {StatusCode::out_of_memory,
            "it is more than the device has free, and managed memory is not asked for beyond that "
            "without oversubscribe; the pager 'staged' takes no more than its window"};
  }
  bytes_ = params.bytes;
  window_bytes_ = params.window_bytes;
  device_ = params.device;
  if (const Status status = allocate_managed(bytes_, &memory_); !status.ok()) return status;
  if (const Status status = keep_on_host(memory_, bytes_, device_); !status.ok()) return status;
  if (const Status status = host_uses(memory_, bytes_); !status.ok()) return status;
  std::memset(memory_, 0, static_cast<std::size_t>(bytes_));  // and so the host has its pages
  return {};
}

constexpr Pager kPager = pager_of<ManagedCarrier>("managed", supports);

}  // namespace

const Pager& managed_pager() { return kPager; }

}  // namespace qlora::cuda
