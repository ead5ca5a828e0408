// Shared memory: the only way in which kernels read and write it.
//
//   __shared__ SharedArray<float, 256> table;             at function scope
//   const auto tile = dynamic_shared<float>(offset, n);   of the launch's dynamic_shared bytes
#pragma once

#include <bit>
#include <cstdint>

#include "device/global.cuh"
#include "device/vec.cuh"

namespace qlora::cuda {

template <class T>
class Shared {
 public:
  __device__ explicit Shared(T* data) : data_(data) {}

  [[nodiscard]] __device__ T load(int i) const { return data_[i]; }
  __device__ void store(int i, T value) const { data_[i] = value; }
  template <int N>
  [[nodiscard]] __device__ Vec<T, N> load_vec(int i) const {
    using W = typename detail::Word<sizeof(Vec<T, N>)>::type;
    return std::bit_cast<Vec<T, N>>(*reinterpret_cast<const W*>(data_ + i));
  }
  template <int N>
  __device__ void store_vec(int i, const Vec<T, N>& value) const {
    using W = typename detail::Word<sizeof(value)>::type;
    *reinterpret_cast<W*>(data_ + i) = std::bit_cast<W>(value);
  }
  // atom.shared.add: what was there before.
  __device__ T atomic_add(int i, T value) const { return atomicAdd(data_ + i, value); }

  // Of element i in shared memory's own address space: for the words of cuda/device alone.
  [[nodiscard]] __device__ std::uint32_t address(int i) const {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(data_ + i));
  }

 private:
  T* data_;
};

template <class T, int kSize>
struct SharedArray {
  alignas(16) T data[kSize];

  __device__ Shared<T> view() { return Shared<T>(data); }
  [[nodiscard]] __device__ T load(int i) { return data[i]; }
  __device__ void store(int i, T value) { data[i] = value; }
  template <int N>
  [[nodiscard]] __device__ Vec<T, N> load_vec(int i) {
    return view().template load_vec<N>(i);
  }
  template <int N>
  __device__ void store_vec(int i, const Vec<T, N>& value) {
    view().store_vec(i, value);
  }
};

// `n` elements from that byte on; the launch must have asked for that much.
template <class T>
__device__ Shared<T> dynamic_shared(int byte_offset, [[maybe_unused]] int n) {
  extern __shared__ __align__(128) unsigned char bytes[];
  return Shared<T>(reinterpret_cast<T*>(bytes + byte_offset));
}

// The same, of dynamic memory that begins at a multiple of 1024 bytes (wgmma.cuh).
template <class T>
__device__ Shared<T> swizzled_shared(int byte_offset, [[maybe_unused]] int n) {
  extern __shared__ __align__(1024) unsigned char aligned_bytes[];
  return Shared<T>(reinterpret_cast<T*>(aligned_bytes + byte_offset));
}

}  // namespace qlora::cuda
