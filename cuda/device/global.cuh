// Global memory: the only way in which kernels read and write it.
//
// A Global is a pointer that says how far it reaches, so that every launch declares its buffers.
// Here the extent is dropped, and an access is one instruction; the emulator's twin of this file
// keeps it and checks each access against it.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "device/vec.cuh"

namespace qlora::cuda {

namespace detail {

// The built-in type that moves that many bytes in one instruction.
template <std::size_t kBytes>
struct Word;
template <>
struct Word<1> {
  using type = std::uint8_t;
};
template <>
struct Word<2> {
  using type = std::uint16_t;
};
template <>
struct Word<4> {
  using type = std::uint32_t;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// ld.global.nc where nothing writes the buffer during the launch, else ld.global
template <class V, bool kReadOnly>
__device__ V load_word(const void* p) {
  using W = typename Word<sizeof(V)>::type;
  const W* from = static_cast<const W*>(p);
  if constexpr (kReadOnly) return std::bit_cast<V>(__ldg(from));
  return std::bit_cast<V>(*from);
}

}  // namespace detail

template <class T>
class Global {
  using Value = std::remove_const_t<T>;

 public:
  Global() = default;
  __host__ __device__ Global(T* data, std::int64_t) : data_(data) {}

  // Whether accesses of that many bytes are aligned at multiples of their size from the start.
  [[nodiscard]] __host__ bool aligned(std::uintptr_t bytes) const {
    return reinterpret_cast<std::uintptr_t>(data_) % bytes == 0;
  }

  [[nodiscard]] __device__ Value load(std::int64_t i) const {
    return detail::load_word<Value, std::is_const_v<T>>(data_ + i);
  }
  template <int N>
  [[nodiscard]] __device__ Vec<Value, N> load_vec(std::int64_t i) const {
    return detail::load_word<Vec<Value, N>, std::is_const_v<T>>(data_ + i);
  }
  __device__ void store(std::int64_t i, Value value) const { data_[i] = value; }
  template <int N>
  __device__ void store_vec(std::int64_t i, const Vec<Value, N>& value) const {
    using W = typename detail::Word<sizeof(value)>::type;
    *reinterpret_cast<W*>(data_ + i) = std::bit_cast<W>(value);
  }
  // atom.global.add, relaxed: what was there before. For tickets and counts: the order in which
  // threads come is open, so sums of floats would not be the same in every run.
  __device__ Value atomic_add(std::int64_t i, Value value) const {
    static_assert(std::is_integral_v<T>);
    return atomicAdd(data_ + i, value);
  }

  // Of element i: for the words of cuda/device alone.
  [[nodiscard]] __device__ T* address(std::int64_t i) const { return data_ + i; }

 private:
  T* data_ = nullptr;
};

// fence.acq_rel.gpu: orders this thread's accesses, and those it has seen, before those that
// follow, for threads of other blocks too. A block hands its stores to another so:
//
//   stores; sync_block(); in one thread: fence_gpu(), tickets.atomic_add(0, 1), fence_gpu();
//   sync_block(); the block that drew the last ticket loads what the others stored, by a Global
//   whose type is not const.
__device__ inline void fence_gpu() { __threadfence(); }

}  // namespace qlora::cuda
