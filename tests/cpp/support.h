// What the tests of the CPU paths share: guarded outputs, made-up numbers, and the count of what
// failed. They need neither torch nor Python, so they also run where only a compiler is.
#pragma once

#include <bit>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "isa.h"
#include "qlora_native/layout.h"
#include "qlora_native/params.h"

namespace qlora::test {

using Bytes = std::vector<std::uint8_t>;

inline constexpr DType kDTypes[] = {DType::float32, DType::float16, DType::bfloat16};

inline int failures = 0;
inline int cases = 0;

inline void count_case() { ++cases; }

inline long long number(std::int64_t n) { return n; }

[[gnu::format(printf, 1, 2)]] inline void fail(const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::printf("\n");
  ++failures;
}

// Runs the test on every path that this processor has and prints their names; gives main's result.
inline int on_each_isa(void (*test)(const char* isa)) {
  for (int i = 0; cpu::available_isa(i) != nullptr; ++i) {
    const char* const isa = cpu::available_isa(i);
    cases = 0;
    cpu::force_isa(isa);
    test(isa);
    std::printf("%s: %d cases\n", isa, cases);
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}

// An output in the middle of a guarded buffer.
struct Output {
  static constexpr std::size_t kMargin = 64;
  static constexpr std::uint8_t kSentinel = 0xA5;

  Bytes buffer;
  std::size_t size;

  explicit Output(std::int64_t bytes)
      : buffer(static_cast<std::size_t>(bytes) + 2 * kMargin, kSentinel),
        size(static_cast<std::size_t>(bytes)) {}
  explicit Output(const Bytes& content) : Output(static_cast<std::int64_t>(content.size())) {
    if (size > 0) std::memcpy(buffer.data() + kMargin, content.data(), size);
  }

  template <class T>
  T* as() {
    return reinterpret_cast<T*>(buffer.data() + kMargin);
  }
  [[nodiscard]] const std::uint8_t* data() const { return buffer.data() + kMargin; }
  [[nodiscard]] bool intact() const {
    for (std::size_t i = 0; i < kMargin; ++i) {
      if (buffer[i] != kSentinel || buffer[kMargin + size + i] != kSentinel) return false;
    }
    return true;
  }
};

// xorshift32: the same values on every platform.
struct Random {
  std::uint32_t state = 2463534242u;

  std::uint32_t bits() {
    state ^= state << 13;
    state ^= state >> 17;
    state ^= state << 5;
    return state;
  }
  // About uniform in [-1, 1).
  float unit() { return static_cast<float>(bits() >> 8) * 0x1p-23f - 1.0f; }
  // Over all magnitudes; one in 64 is infinite, NaN, subnormal or zero.
  float value() {
    const std::uint32_t chosen = bits() % 256;
    if (chosen == 0) return std::bit_cast<float>(0x7F800000u | (bits() & 0x80000000u));
    if (chosen == 1) return std::bit_cast<float>(0x7FC00000u);
    if (chosen == 2) return std::bit_cast<float>(bits() & 0x807FFFFFu);
    if (chosen == 3) return 0.0f;
    return unit() * std::bit_cast<float>(((bits() % 40) + 100) << 23);
  }
};

inline void put(std::uint8_t* at, DType dtype, float value) {
  if (dtype == DType::float32) {
    std::memcpy(at, &value, sizeof value);
  } else {
    const std::uint16_t bits = dtype == DType::float16 ? from_float<Float16>(value).bits
                                                       : from_float<BFloat16>(value).bits;
    std::memcpy(at, &bits, sizeof bits);
  }
}

inline float get(const std::uint8_t* at, DType dtype) {
  if (dtype == DType::float32) {
    float value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  std::uint16_t bits;
  std::memcpy(&bits, at, sizeof bits);
  return dtype == DType::float16 ? to_float(Float16{bits}) : to_float(BFloat16{bits});
}

// n values of the type, from `next`.
template <class Next>
Bytes make_values(std::int64_t n, DType dtype, const Next& next) {
  Bytes bytes(static_cast<std::size_t>(n * size_of(dtype)));
  for (std::int64_t i = 0; i < n; ++i) put(bytes.data() + i * size_of(dtype), dtype, next());
  return bytes;
}

inline Bytes random_values(Random& random, std::int64_t n, DType dtype) {
  return make_values(n, dtype, [&] { return random.value(); });
}

inline Bytes unit_values(Random& random, std::int64_t n, DType dtype) {
  return make_values(n, dtype, [&] { return random.unit(); });
}

// A pool of three threads that runs its parts one after the other.
inline Context three_threads() {
  const auto run = [](std::int64_t n, std::int64_t grain, Context::Body body, void* arg) {
    const std::int64_t fit = grain > 0 ? n / grain : n;
    const std::int64_t parts = fit < 1 ? 1 : fit < 3 ? fit : 3;
    for (std::int64_t i = 0; i < parts; ++i) body(arg, n * i / parts, n * (i + 1) / parts);
  };
  return {.parallel_for = run, .threads = 3, .stream = nullptr};
}

}  // namespace qlora::test
