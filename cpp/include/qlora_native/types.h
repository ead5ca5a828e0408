// The element types that cross the contract, and their storage.
//
// float16 and bfloat16 are carried as their 16 bits: the contract must compile where neither a
// compiler extension nor CUDA's headers are there. The scalar conversions below are the definition
// (round to nearest even, NaN stays NaN); a backend may use instructions that give the same bits.
#pragma once

#include <bit>
#include <cstdint>

#if defined(__CUDACC__)
#define QLORA_HOST_DEVICE __host__ __device__
#else
#define QLORA_HOST_DEVICE
#endif

namespace qlora {

enum class DType : std::uint8_t { float32, float16, bfloat16 };

struct Float16 {
  std::uint16_t bits;
};

struct BFloat16 {
  std::uint16_t bits;
};

[[nodiscard]] constexpr std::int64_t size_of(DType dtype) {
  return dtype == DType::float32 ? 4 : 2;
}

inline constexpr float kLargestFloat = 0x1.fffffep127f;  // the largest finite one

QLORA_HOST_DEVICE constexpr float to_float(float value) { return value; }

QLORA_HOST_DEVICE constexpr float to_float(BFloat16 value) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
}

QLORA_HOST_DEVICE constexpr float to_float(Float16 value) {
  const std::uint32_t sign = (value.bits & 0x8000u) << 16;
  const std::uint32_t exponent = (value.bits >> 10) & 0x1Fu;
  const std::uint32_t mantissa = value.bits & 0x3FFu;
  if (exponent == 0x1F) {  // infinity, or a NaN made quiet as the processors' instructions do
    const std::uint32_t quiet = mantissa != 0 ? 0x400000u : 0u;
    return std::bit_cast<float>(sign | 0x7F800000u | (mantissa << 13) | quiet);
  }
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24, exact in fp32
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(magnitude));
  }
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

template <class T>
QLORA_HOST_DEVICE constexpr T from_float(float value);

template <>
QLORA_HOST_DEVICE constexpr float from_float<float>(float value) {
  return value;
}

template <>
QLORA_HOST_DEVICE constexpr BFloat16 from_float<BFloat16>(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) {
    return {static_cast<std::uint16_t>((bits >> 16) | 0x40u)};
  }
  const std::uint32_t round_to_even = 0x7FFFu + ((bits >> 16) & 1u);
  return {static_cast<std::uint16_t>((bits + round_to_even) >> 16)};
}

template <>
QLORA_HOST_DEVICE constexpr Float16 from_float<Float16>(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) {
    const std::uint32_t payload = 0x7E00u | ((magnitude >> 13) & 0x3FFu);
    return {static_cast<std::uint16_t>(sign | payload)};
  }
  if (magnitude >= 0x47800000u) {  // 65536 and above, infinity with them
    return {static_cast<std::uint16_t>(sign | 0x7C00u)};
  }
  if (magnitude < 0x38800000u) {
    // Below 2^-14 the result is subnormal. Adding 0.5 puts its last bit at the sum's last bit, so
    // that the addition itself rounds to nearest even.
    const float sum = std::bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(sum) - 0x3F000000u))};
  }
  const std::uint32_t rebiased = magnitude - 0x38000000u;
  const std::uint32_t round_to_even = 0xFFFu + ((rebiased >> 13) & 1u);
  return {static_cast<std::uint16_t>(sign | ((rebiased + round_to_even) >> 13))};
}

}  // namespace qlora
