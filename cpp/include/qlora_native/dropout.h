// The dropout mask of the LoRA branch, a function of (seed, row, column) alone.
//
// The mask is never stored: the forward pass, its recomputation under gradient checkpointing and
// the backward pass all ask this function, so every backend and every tiling must give the same
// bits. A row's key is a 64-bit finalizer (splitmix64, Steele et al. 2014) of seed and row; an
// element's bits are a two-multiply 32-bit finalizer of its column that takes in both halves of the
// key. Each step is an add, xor, shift or 32-bit multiply, so it vectorizes on every instruction
// set.
#pragma once

#include <cstdint>

#include "qlora_native/types.h"

namespace qlora {

struct DropoutRowKey {
  std::uint32_t add;
  std::uint32_t mix;
};

QLORA_HOST_DEVICE constexpr DropoutRowKey dropout_row_key(std::uint64_t seed, std::int64_t row) {
  std::uint64_t z = seed + 0x9E3779B97F4A7C15ull * (static_cast<std::uint64_t>(row) + 1);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  z ^= z >> 31;
  return {static_cast<std::uint32_t>(z), static_cast<std::uint32_t>(z >> 32)};
}

QLORA_HOST_DEVICE constexpr std::uint32_t dropout_bits(DropoutRowKey key, std::uint32_t column) {
  std::uint32_t x = column + key.add;
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = ((x ^ (x >> 15)) + key.mix) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// An element is kept when its upper 31 bits are at least this: 2^31 so that signed vector compares
// do.
QLORA_HOST_DEVICE constexpr std::uint32_t dropout_threshold(float p) {
  const double scaled = static_cast<double>(p) * 2147483648.0;
  return static_cast<std::uint32_t>(scaled + 0.5);
}

QLORA_HOST_DEVICE constexpr bool dropout_keeps(DropoutRowKey key, std::uint32_t column,
                                               std::uint32_t threshold) {
  return (dropout_bits(key, column) >> 1) >= threshold;
}

// What a kept element is multiplied with.
QLORA_HOST_DEVICE constexpr float dropout_gain(float p) { return 1.0f / (1.0f - p); }

}  // namespace qlora
