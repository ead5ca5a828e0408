// What the programs that run kernels on the emulator share (run_*.cpp): buffers with nothing behind
// them, values for these, and a digest of what a kernel wrote.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

#include "qlora_native/status.h"
#include "qlora_native/types.h"

namespace emulated_run {

using namespace qlora;

inline constexpr std::uint64_t kEmptyDigest = 0xCBF29CE484222325ull;  // FNV-1a
inline std::uint64_t digest = kEmptyDigest;

// What was added since the last call, and starts anew.
inline std::uint64_t take_digest() { return std::exchange(digest, kEmptyDigest); }

inline void add(const void* data, std::int64_t bytes) {
  const auto* p = static_cast<const unsigned char*>(data);
  for (std::int64_t i = 0; i < bytes; ++i) digest = (digest ^ p[i]) * 0x100000001B3ull;
}

inline void check(const Status& status) {
  if (status.ok()) return;
  std::printf("%s\n", status.message);
  std::exit(1);
}

// Room for n elements of `size` bytes, that many elements past a 16-byte boundary.
class Buffer {
 public:
  Buffer(std::int64_t n, std::int64_t size, std::int64_t shift)
      : bytes_(n * size), memory_(static_cast<std::size_t>(bytes_ + 32 + shift * size)) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
    data_ = memory_.data() + (16 - address % 16) + shift * size;
  }
  template <class T>
  [[nodiscard]] T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  void digest() const { add(data_, bytes_); }

 private:
  std::int64_t bytes_;
  std::vector<unsigned char> memory_;
  unsigned char* data_;
};

inline Buffer values(std::int64_t n, DType dtype, std::int64_t shift) {
  Buffer buffer(n, size_of(dtype), shift);
  std::uint64_t state = static_cast<std::uint64_t>(n) * 2654435761u + 1;
  for (std::int64_t i = 0; i < n; ++i) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    const float value = static_cast<float>(static_cast<std::int64_t>(state >> 33) - (1 << 30)) *
                        (i % 97 == 5 ? 0x1p-40f : 0x1p-33f);
    if (dtype == DType::float32) {
      buffer.as<float>()[i] = value;
    } else if (dtype == DType::float16) {
      buffer.as<Float16>()[i] = from_float<Float16>(value);
    } else {
      buffer.as<BFloat16>()[i] = from_float<BFloat16>(value);
    }
  }
  return buffer;
}

}  // namespace emulated_run
