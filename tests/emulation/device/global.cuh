// Twin of cuda/device/global.cuh: keeps a buffer's extent, checks each access against it and
// against the alignment that the instruction asks for, and counts it.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "counters.h"
#include "device/thread.cuh"
#include "device/vec.cuh"
#include "fault.h"
#include "global_memory.h"

namespace qlora::cuda {

template <class T>
class Global {
  using Value = std::remove_const_t<T>;

 public:
  Global() = default;
  Global(T* data, std::int64_t size) : data_(data), size_(size) {}

  [[nodiscard]] bool aligned(std::uintptr_t bytes) const { return address(0) % bytes == 0; }

  [[nodiscard]] Value load(std::int64_t i, const Where& where = Where::current()) const {
    return load_as<Value>(i, where);
  }
  template <int N>
  [[nodiscard]] Vec<Value, N> load_vec(std::int64_t i,
                                       const Where& where = Where::current()) const {
    return load_as<Vec<Value, N>>(i, where);
  }
  void store(std::int64_t i, Value value, const Where& where = Where::current()) const {
    store_as(i, value, where);
  }
  template <int N>
  void store_vec(std::int64_t i, const Vec<Value, N>& value,
                 const Where& where = Where::current()) const {
    store_as(i, value, where);
  }
  // `count` vectors, one after another, by one instruction.
  template <int N>
  [[nodiscard]] std::vector<Vec<Value, N>> load_run(std::int64_t i, int count,
                                                    const Where& where) const {
    constexpr auto kBytes = static_cast<int>(sizeof(Vec<Value, N>));
    for (int v = 0; v < count; ++v) {
      check<Vec<Value, N>>(i + v * N, where);
      emulation::global_memory().read(address(i + v * N), kBytes, std::is_const_v<T>, where);
    }
    emulation::counters().load(address(i), count * kBytes, where);
    std::vector<Vec<Value, N>> run(static_cast<std::size_t>(count));
    std::memcpy(run.data(), data_ + i, run.size() * sizeof run[0]);
    return run;
  }
  Value atomic_add(std::int64_t i, Value value, const Where& where = Where::current()) const {
    static_assert(std::is_integral_v<T>);
    check<Value>(i, where);
    emulation::global_memory().atomic(address(i), static_cast<int>(sizeof(Value)), where);
    const Value before = data_[i];
    data_[i] = static_cast<Value>(before + value);
    return before;
  }

 private:
  template <class V>
  V load_as(std::int64_t i, const Where& where) const {
    check<V>(i, where);
    constexpr auto kBytes = static_cast<int>(sizeof(V));
    emulation::counters().load(address(i), kBytes, where);
    emulation::global_memory().read(address(i), kBytes, std::is_const_v<T>, where);
    V value;
    std::memcpy(&value, data_ + i, sizeof value);
    return value;
  }

  template <class V>
  void store_as(std::int64_t i, const V& value, const Where& where) const {
    check<V>(i, where);
    constexpr auto kBytes = static_cast<int>(sizeof(V));
    emulation::counters().store(address(i), kBytes, where);
    emulation::global_memory().write(address(i), kBytes, where);
    std::memcpy(data_ + i, &value, sizeof value);
  }

  template <class V>
  void check(std::int64_t i, const Where& where) const {
    constexpr auto kElements = static_cast<std::int64_t>(sizeof(V) / sizeof(T));
    if (i < 0 || i > size_ - kElements) {
      emulation::fault(emulation::FaultKind::out_of_bounds, where,
                       std::to_string(kElements) + " elements at " + std::to_string(i) +
                           " of a buffer of " + std::to_string(size_));
    }
    if (address(i) % sizeof(V) != 0) {
      emulation::fault(emulation::FaultKind::misaligned, where,
                       std::to_string(sizeof(V)) + " bytes at an address that is " +
                           std::to_string(address(i) % sizeof(V)) + " past a multiple");
    }
  }

  [[nodiscard]] std::uintptr_t address(std::int64_t i) const {
    return reinterpret_cast<std::uintptr_t>(data_) + static_cast<std::uintptr_t>(i) * sizeof(T);
  }

  T* data_ = nullptr;
  std::int64_t size_ = 0;
};

inline void fence_gpu() { emulation::global_memory().fence(); }

}  // namespace qlora::cuda
