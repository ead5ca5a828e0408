// Twin of cuda/device/async_copy.cuh: a copy is there at the wait that covers it (copies.h).
#pragma once

#include <cstdint>

#include "device/global.cuh"
#include "device/shared.cuh"

namespace qlora::cuda {

template <int kBytes, class T>
void async_copy(Shared<T> to, int i, Global<const T> from, std::int64_t j, bool valid = true,
                const Where& where = Where::current()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "what cp.async copies");
  using Values = Vec<T, kBytes / static_cast<int>(sizeof(T))>;
  Values values{};
  if (valid) values = from.template load_vec<kBytes / static_cast<int>(sizeof(T))>(j, where);
  machine().thread().copies.start(to.template bytes_of<Values>(i, where), &values, where);
}

inline void commit_copies() { machine().thread().copies.commit(); }

template <int kPending>
void wait_copies() {
  static_assert(kPending >= 0);
  machine().thread().copies.wait(kPending);
}

}  // namespace qlora::cuda
