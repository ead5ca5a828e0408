// The pager "staged": all bytes in pinned memory of the host, and a window of device memory in
// which ranges stand while they are present. Works on every device and system.
//
// Limited by the link, which carries both directions at once: the copies are the copy engines', and
// the two side streams keep one of these busy each.
#include <cstring>
#include <utility>

#include "device/memory.cuh"
#include "paging/carrier.h"
#include "paging/pagers.h"
#include "paging/table.h"
#include "paging/window.h"

namespace qlora::cuda {
namespace {

constexpr std::int64_t aligned(std::int64_t bytes) {
  return (bytes + kPagedAlignment - 1) / kPagedAlignment * kPagedAlignment;
}

class StagedCarrier final : public Carrier {
 public:
  ~StagedCarrier() override {
    if (device_ != nullptr) free_device(device_);
    if (pinned_ != nullptr) free_pinned(pinned_);
  }

  Status open(const PagedParams& params) override {
    window_bytes_ = aligned(params.window_bytes > 0 ? params.window_bytes : params.bytes);
    const Status status = allocate_pinned(params.bytes, &pinned_);
    if (status.code == StatusCode::out_of_memory) {
      return {StatusCode::out_of_memory, "the host has no memory left that can be pinned for it"};
    }
    if (!status.ok()) return status;
    const Status known = host_uses(pinned_, params.bytes);
    std::memset(pinned_, 0, static_cast<std::size_t>(params.bytes));
    return known;
  }

  [[nodiscard]] char* host() const override { return static_cast<char*>(pinned_); }

  Status take(std::int64_t, std::int64_t bytes, std::int64_t, char** address,
              std::vector<Mark>* after) override {
    if (device_ == nullptr) {
      const Status status = allocate_device(window_bytes_, &device_);
      if (!status.ok()) return status;
      window_.reset(window_bytes_);
    }
    const auto offset = window_.take(aligned(bytes), after);
    *address = offset ? static_cast<char*>(device_) + *offset : nullptr;
    return {};
  }

  void give(char* address, std::int64_t bytes, std::vector<Mark> after) override {
    window_.give(address - static_cast<char*>(device_), aligned(bytes), std::move(after));
  }

  void withdraw(char* address, std::int64_t bytes, std::vector<Mark> after) override {
    give(address, bytes, std::move(after));
  }

  Status to_device(std::int64_t begin, std::int64_t bytes, char* address, void* stream) override {
    return copy_to_device(address, host() + begin, bytes, stream);
  }

  // The host has what nobody modified.
  [[nodiscard]] bool moves(bool modified) const override { return modified; }

  Status to_host(std::int64_t begin, std::int64_t bytes, const char* address,
                 void* stream) override {
    return copy_to_host(host() + begin, address, bytes, stream);
  }

  void give_back() override {
    if (device_ != nullptr) free_device(device_);
    device_ = nullptr;
  }

 private:
  void* pinned_ = nullptr;
  void* device_ = nullptr;  // null: not asked for yet, or given back
  std::int64_t window_bytes_ = 0;
  Window window_;
};

Status supports(int device) { return DeviceGuard(device).status(); }

constexpr Pager kPager = pager_of<StagedCarrier>("staged", supports);

}  // namespace

const Pager& staged_pager() { return kPager; }

}  // namespace qlora::cuda
