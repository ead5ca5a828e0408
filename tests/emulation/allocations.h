// Memory that the runtime handed out, and who used each byte of it last.
//
// Device memory is for kernels and copies, pinned memory for the host and copies. The pages of
// managed memory are on one side or the other, move where they are prefetched to, and are found
// missing by a kernel that touches one on the host's side: a page fault, which a GPU would serve.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "fault.h"
#include "past.h"

namespace emulation {

enum class MemoryKind { device, pinned, managed };

const char* name_of(MemoryKind kind);

// Some work, as messages name it.
struct Work {
  const char* what = "";     // "kernel", "copy to the device", …
  std::uint64_t number = 0;  // among all work
  Step step;
};

std::string to_string(const Work& work);

class Allocation {
 public:
  static constexpr std::int64_t kPageBytes = 4096;

  Allocation(MemoryKind kind, std::int64_t bytes);
  ~Allocation();
  Allocation(const Allocation&) = delete;
  Allocation& operator=(const Allocation&) = delete;

  [[nodiscard]] MemoryKind kind() const { return kind_; }
  [[nodiscard]] std::int64_t bytes() const { return bytes_; }
  [[nodiscard]] char* data() const { return data_; }
  [[nodiscard]] bool holds(std::uintptr_t address, std::int64_t bytes) const;

  // `work` reads or writes those bytes, knowing `past`: the fault, where something of which it
  // knows nothing wrote them, or something reads what it writes.
  std::optional<Fault> use(std::uintptr_t address, std::int64_t bytes, bool writes,
                           const Work& work, const Past& past);

  // The pages that those bytes lie on move; how many bytes of them were not there yet.
  std::int64_t move(std::uintptr_t address, std::int64_t bytes, bool to_device);
  [[nodiscard]] std::int64_t bytes_on_device() const { return pages_on_device_ * kPageBytes; }

  // A running kernel touches bytes; what it did touch is told at its end.
  void touch(std::uintptr_t address, int bytes, bool writes);
  std::optional<Fault> end_kernel(const Work& kernel, const Past& past);

 private:
  static constexpr std::uint8_t kRead = 1;
  static constexpr std::uint8_t kWritten = 2;

  struct Segment {
    Work written;
    std::vector<Work> reads;  // since then, one of each actor
  };

  void split(std::uintptr_t address);
  [[nodiscard]] std::string place(std::uintptr_t address, std::int64_t bytes) const;
  std::optional<Fault> touched_run(std::int64_t begin, std::int64_t end, std::uint8_t how,
                                   const Work& kernel, const Past& past);

  MemoryKind kind_;
  std::int64_t bytes_;
  char* data_;
  std::map<std::uintptr_t, Segment> history_;  // by where each begins; they tile the memory
  std::vector<bool> on_device_;                // of each page
  std::int64_t pages_on_device_ = 0;
  std::vector<std::uint8_t> touched_;  // of each byte, by the kernel that runs
  std::int64_t first_touched_ = 0;
  std::int64_t end_touched_ = 0;
};

class Allocations {
 public:
  void* add(MemoryKind kind, std::int64_t bytes);
  void remove(const void* data);
  // The one that has all of those bytes, or null.
  Allocation* find(const void* address, std::int64_t bytes = 1);

  [[nodiscard]] std::int64_t size() const { return static_cast<std::int64_t>(list_.size()); }
  [[nodiscard]] std::int64_t bytes_on_device() const;
  // For every access of every kernel, most of which are to memory of the program's own.
  void touch(std::uintptr_t address, int bytes, bool writes) {
    if (!list_.empty()) touch_one(address, bytes, writes);
  }
  std::optional<Fault> end_kernel(const Work& kernel, const Past& past);

 private:
  void touch_one(std::uintptr_t address, int bytes, bool writes);

  std::vector<std::unique_ptr<Allocation>> list_;
};

inline Allocations& allocations() {
  static Allocations list;
  return list;
}

}  // namespace emulation
