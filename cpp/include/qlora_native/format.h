// A 4-bit format as a value: what a code means, and which code a value gets.
//
// Kernels take the format as a parameter, so a new format is one more constant here. Values by
// code: NF4 from QLoRA (Dettmers et al., 2023, appendix E), FP4 as bitsandbytes has it (code 8 is
// -0). Encoding is "nearest" by the fp32 midpoints of the ascending values, a tie to the lower one:
// code = order[number of midpoints that are < x].
#pragma once

#include <cstdint>
#include <string_view>

namespace qlora {

enum class FormatTag : std::uint8_t { nf4, fp4 };

struct Format {
  FormatTag tag;
  std::uint8_t zero_code;  // of an all-zero block and of the odd tail's padding
  float values[16];        // by code
  std::uint8_t order[16];  // codes by ascending value
  float midpoints[15];     // between neighbours in that order
};

constexpr Format make_format(FormatTag tag, std::uint8_t zero_code, const float (&values)[16],
                             const std::uint8_t (&order)[16]) {
  Format format{tag, zero_code, {}, {}, {}};
  for (int i = 0; i < 16; ++i) {
    format.values[i] = values[i];
    format.order[i] = order[i];
  }
  for (int i = 0; i < 15; ++i) {
    format.midpoints[i] = (values[order[i]] + values[order[i + 1]]) / 2.0f;
  }
  return format;
}

inline constexpr Format kNf4 = make_format(
    FormatTag::nf4, 7,
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
     -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
     0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
     0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f},
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15});

// The two zeros stand side by side in the order (0, then 8), so a tiny positive value gets code 8.
inline constexpr Format kFp4 =
    make_format(FormatTag::fp4, 0,
                {0.0f, 0.0052083334885537624f, 0.6666666865348816f, 1.0f, 0.3333333432674408f, 0.5f,
                 0.1666666716337204f, 0.25f, 0.0f, -0.0052083334885537624f, -0.6666666865348816f,
                 -1.0f, -0.3333333432674408f, -0.5f, -0.1666666716337204f, -0.25f},
                {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3});

inline constexpr const char* kFormatNames = "'nf4', 'fp4'";

// The format of that name, or null.
constexpr const Format* find_format(std::string_view name) {
  if (name == "nf4") return &kNf4;
  if (name == "fp4") return &kFp4;
  return nullptr;
}

}  // namespace qlora
