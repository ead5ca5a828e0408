// N elements that are loaded or stored by one instruction.
#pragma once

#include <cstddef>

namespace qlora::cuda {

template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  static_assert(sizeof(T) * N <= 16, "16 bytes are the widest access of a thread");
  T value[N];
};

}  // namespace qlora::cuda
