#include "allocations.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

namespace emulation {

const char* name_of(MemoryKind kind) {
  switch (kind) {
    case MemoryKind::device:
      return "device memory";
    case MemoryKind::pinned:
      return "pinned memory";
    case MemoryKind::managed:
      return "managed memory";
  }
  return "memory";
}

std::string to_string(const Work& work) {
  return std::string(work.what) + " (work " + std::to_string(work.number) + ", " +
         (work.step.actor == 0 ? "the host" : "stream " + std::to_string(work.step.actor - 1)) +
         ")";
}

Allocation::Allocation(MemoryKind kind, std::int64_t bytes) : kind_(kind), bytes_(bytes) {
  const std::int64_t pages = (bytes + kPageBytes - 1) / kPageBytes;
  const auto size = static_cast<std::size_t>(pages * kPageBytes);
  data_ = static_cast<char*>(std::aligned_alloc(kPageBytes, size));
  if (data_ == nullptr) throw std::bad_alloc();
  std::memset(data_, 0xFF, size);  // NaN, in every type
  history_.emplace(reinterpret_cast<std::uintptr_t>(data_), Segment{});
  on_device_.resize(static_cast<std::size_t>(pages));
}

Allocation::~Allocation() { std::free(data_); }

bool Allocation::holds(std::uintptr_t address, std::int64_t bytes) const {
  const auto offset = static_cast<std::int64_t>(address - reinterpret_cast<std::uintptr_t>(data_));
  return address >= reinterpret_cast<std::uintptr_t>(data_) && offset <= bytes_ - bytes;
}

std::string Allocation::place(std::uintptr_t address, std::int64_t bytes) const {
  return std::to_string(bytes) + " bytes at " +
         std::to_string(address - reinterpret_cast<std::uintptr_t>(data_)) + " of " +
         std::to_string(bytes_) + " of " + name_of(kind_);
}

void Allocation::split(std::uintptr_t address) {
  const auto after = history_.upper_bound(address);
  if (after == history_.begin()) return;
  const auto here = std::prev(after);
  if (here->first != address) history_.emplace_hint(after, address, here->second);
}

std::optional<Fault> Allocation::use(std::uintptr_t address, std::int64_t bytes, bool writes,
                                     const Work& work, const Past& past) {
  const std::uintptr_t end = address + static_cast<std::uintptr_t>(bytes);
  split(address);
  if (end < reinterpret_cast<std::uintptr_t>(data_) + static_cast<std::uintptr_t>(bytes_)) {
    split(end);
  }
  std::optional<Fault> found;
  const auto must_know = [&](const Work& other, const char* did) {
    if (found || other.number == 0 || past.knows(other.step)) return;
    found = {FaultKind::unordered, std::string(name_of(FaultKind::unordered)) + ": " +
                                       to_string(work) + (writes ? " writes " : " reads ") +
                                       place(address, bytes) + ", which " + to_string(other) + did +
                                       ", and no event orders the two"};
  };
  const auto first = history_.find(address);
  auto at = first;
  for (; at != history_.end() && at->first < end; ++at) {
    Segment& segment = at->second;
    must_know(segment.written, " wrote");
    if (writes) {
      for (const Work& read : segment.reads) must_know(read, " read");
      segment = {work, {}};
    } else {
      std::erase_if(segment.reads, [&](const Work& r) { return r.step.actor == work.step.actor; });
      segment.reads.push_back(work);
    }
  }
  if (writes && first != at) history_.erase(std::next(first), at);  // one segment again
  return found;
}

std::int64_t Allocation::move(std::uintptr_t address, std::int64_t bytes, bool to_device) {
  const auto begin = static_cast<std::int64_t>(address - reinterpret_cast<std::uintptr_t>(data_));
  std::int64_t moved = 0;
  for (std::int64_t p = begin / kPageBytes; p * kPageBytes < begin + bytes; ++p) {
    auto page = on_device_[static_cast<std::size_t>(p)];
    moved += page != to_device ? kPageBytes : 0;
    page = to_device;
  }
  pages_on_device_ += (to_device ? moved : -moved) / kPageBytes;
  return moved;
}

void Allocation::touch(std::uintptr_t address, int bytes, bool writes) {
  const auto begin = static_cast<std::int64_t>(address - reinterpret_cast<std::uintptr_t>(data_));
  const std::int64_t end = std::min(begin + bytes, bytes_);
  if (touched_.empty()) touched_.resize(static_cast<std::size_t>(bytes_));
  if (first_touched_ == end_touched_) first_touched_ = end_touched_ = begin;
  first_touched_ = std::min(first_touched_, begin);
  end_touched_ = std::max(end_touched_, end);
  for (std::int64_t i = begin; i < end; ++i) {
    touched_[static_cast<std::size_t>(i)] |= writes ? kWritten : kRead;
  }
}

std::optional<Fault> Allocation::touched_run(std::int64_t begin, std::int64_t end, std::uint8_t how,
                                             const Work& kernel, const Past& past) {
  const std::uintptr_t address =
      reinterpret_cast<std::uintptr_t>(data_) + static_cast<std::uintptr_t>(begin);
  auto found = use(address, end - begin, (how & kWritten) != 0, kernel, past);
  if (found) return found;
  if (kind_ == MemoryKind::pinned) {
    return Fault{FaultKind::misuse, std::string(name_of(FaultKind::misuse)) + ": " +
                                        to_string(kernel) + " touches " +
                                        place(address, end - begin)};
  }
  if (kind_ == MemoryKind::managed && move(address, end - begin, true) > 0) {
    return Fault{FaultKind::page_fault, std::string(name_of(FaultKind::page_fault)) + ": " +
                                            to_string(kernel) + " touches " +
                                            place(address, end - begin) +
                                            ", which is not all on the device"};
  }
  return {};
}

std::optional<Fault> Allocation::end_kernel(const Work& kernel, const Past& past) {
  std::optional<Fault> found;
  std::int64_t run = first_touched_;
  const auto how = [&](std::int64_t i) { return touched_[static_cast<std::size_t>(i)]; };
  for (std::int64_t i = first_touched_; i < end_touched_; ++i) {
    if (i + 1 < end_touched_ && how(i + 1) == how(i)) continue;
    if (how(i) != 0) {
      auto fault = touched_run(run, i + 1, how(i), kernel, past);
      if (!found) found = std::move(fault);
    }
    run = i + 1;
  }
  std::fill(touched_.begin() + first_touched_, touched_.begin() + end_touched_, std::uint8_t{0});
  first_touched_ = end_touched_ = 0;
  return found;
}

void* Allocations::add(MemoryKind kind, std::int64_t bytes) {
  return list_.emplace_back(std::make_unique<Allocation>(kind, bytes))->data();
}

void Allocations::remove(const void* data) {
  std::erase_if(list_, [&](const auto& a) { return a->data() == data; });
}

Allocation* Allocations::find(const void* address, std::int64_t bytes) {
  const auto at = std::find_if(list_.begin(), list_.end(), [&](const auto& a) {
    return a->holds(reinterpret_cast<std::uintptr_t>(address), bytes);
  });
  return at == list_.end() ? nullptr : at->get();
}

std::int64_t Allocations::bytes_on_device() const {
  std::int64_t sum = 0;
  for (const auto& a : list_) {
    sum += a->kind() == MemoryKind::device ? a->bytes() : a->bytes_on_device();
  }
  return sum;
}

void Allocations::touch_one(std::uintptr_t address, int bytes, bool writes) {
  for (const auto& a : list_) {
    if (a->holds(address, 1)) a->touch(address, bytes, writes);
  }
}

std::optional<Fault> Allocations::end_kernel(const Work& kernel, const Past& past) {
  std::optional<Fault> found;
  for (const auto& a : list_) {
    auto fault = a->end_kernel(kernel, past);
    if (!found) found = std::move(fault);
  }
  return found;
}

}  // namespace emulation
