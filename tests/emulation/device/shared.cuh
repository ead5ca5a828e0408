// Twin of cuda/device/shared.cuh: each element has a cell that remembers who wrote and read it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#include "counters.h"
#include "device/thread.cuh"
#include "device/vec.cuh"
#include "fault.h"
#include "shadow.h"

namespace qlora::cuda {

template <class T>
class Shared {
 public:
  // `cells_of_element` cells to an element; `offset` bytes from where banks are counted.
  Shared(T* data, emulation::Cell* cells, int cells_of_element, int size, std::size_t offset)
      : data_(data), cells_(cells), stride_(cells_of_element), size_(size), offset_(offset) {}

  [[nodiscard]] T load(int i, const Where& where = Where::current()) const {
    return load_as<T>(i, where);
  }
  template <int N>
  [[nodiscard]] Vec<T, N> load_vec(int i, const Where& where = Where::current()) const {
    return load_as<Vec<T, N>>(i, where);
  }
  void store(int i, T value, const Where& where = Where::current()) const {
    store_as(i, value, where);
  }
  template <int N>
  void store_vec(int i, const Vec<T, N>& value, const Where& where = Where::current()) const {
    store_as(i, value, where);
  }
  T atomic_add(int i, T value, const Where& where = Where::current()) const {
    emulation::note_atomic(bytes_of<T>(i, where), emulation::running_thread(), where);
    const T before = data_[i];
    data_[i] = static_cast<T>(before + value);
    return before;
  }

  // The V at element i, which is about to be read or written.
  template <class V>
  [[nodiscard]] emulation::SharedBytes bytes_of(int i, const Where& where) const {
    return range_of<V>(i, 1, where);
  }
  // And so many of them.
  template <class V>
  [[nodiscard]] emulation::SharedBytes range_of(int i, int count, const Where& where) const {
    constexpr int kElements = static_cast<int>(sizeof(V) / sizeof(T));
    for (int v = 0; v < count; ++v) check<V>(i + v * kElements, where);
    return {reinterpret_cast<unsigned char*>(data_ + i),
            static_cast<int>(sizeof(V)) * count,
            cells_ + i * stride_,
            kElements * count * stride_,
            i,
            kElements * count};
  }

  // Of element i, in dynamic shared memory (a static array has no place of its own here).
  [[nodiscard]] std::uint32_t dynamic_address(int i, const Where& where) const {
    const emulation::DynamicMemory& memory = emulation::dynamic_memory();
    const auto* element = reinterpret_cast<const unsigned char*>(data_ + i);
    if (element < memory.bytes || element >= memory.bytes + emulation::DynamicMemory::kBytes) {
      emulation::fault(emulation::FaultKind::out_of_bounds, where, "not in dynamic shared memory");
    }
    return static_cast<std::uint32_t>(element - memory.bytes);
  }

 private:
  template <class V>
  V load_as(int i, const Where& where) const {
    emulation::note_read(bytes_of<V>(i, where), emulation::running_thread(), where);
    V value;
    std::memcpy(&value, data_ + i, sizeof value);
    return value;
  }

  template <class V>
  void store_as(int i, const V& value, const Where& where) const {
    emulation::note_write(bytes_of<V>(i, where), emulation::running_thread(), where);
    std::memcpy(data_ + i, &value, sizeof value);
  }

  template <class V>
  void check(int i, const Where& where) const {
    constexpr int kElements = static_cast<int>(sizeof(V) / sizeof(T));
    if (i < 0 || i > size_ - kElements) {
      emulation::fault(emulation::FaultKind::out_of_bounds, where,
                       std::to_string(kElements) + " elements at " + std::to_string(i) +
                           " of a shared array of " + std::to_string(size_));
    }
    const std::size_t at = offset_ + static_cast<std::size_t>(i) * sizeof(T);
    if (at % sizeof(V) != 0) {
      emulation::fault(emulation::FaultKind::misaligned, where,
                       std::to_string(sizeof(V)) + " bytes at shared byte " + std::to_string(at));
    }
    emulation::counters().shared(at, static_cast<int>(sizeof(V)), where);
  }

  T* data_;
  emulation::Cell* cells_;
  int stride_;
  int size_;
  std::size_t offset_;
};

template <class T, int kSize>
struct SharedArray {
  alignas(16) T data[kSize];
  emulation::Cell cells[kSize];

  Shared<T> view() { return Shared<T>(data, cells, 1, kSize, 0); }
  [[nodiscard]] T load(int i, const Where& where = Where::current()) {
    return view().load(i, where);
  }
  void store(int i, T value, const Where& where = Where::current()) {
    view().store(i, value, where);
  }
  template <int N>
  [[nodiscard]] Vec<T, N> load_vec(int i, const Where& where = Where::current()) {
    return view().template load_vec<N>(i, where);
  }
  template <int N>
  void store_vec(int i, const Vec<T, N>& value, const Where& where = Where::current()) {
    view().store_vec(i, value, where);
  }
};

template <class T>
Shared<T> dynamic_shared(int byte_offset, int n, const Where& where = Where::current()) {
  const auto offset = static_cast<std::size_t>(byte_offset);
  const std::size_t end = offset + static_cast<std::size_t>(n) * sizeof(T);
  if (end > machine().launch().dynamic_shared) {
    emulation::fault(emulation::FaultKind::out_of_bounds, where,
                     "dynamic shared memory up to byte " + std::to_string(end) + " of " +
                         std::to_string(machine().launch().dynamic_shared));
  }
  emulation::DynamicMemory& memory = emulation::dynamic_memory();
  return Shared<T>(reinterpret_cast<T*>(memory.bytes + offset), memory.cells + offset,
                   static_cast<int>(sizeof(T)), n, offset);
}

template <class T>
Shared<T> swizzled_shared(int byte_offset, int n, const Where& where = Where::current()) {
  return dynamic_shared<T>(byte_offset, n, where);
}

}  // namespace qlora::cuda
