// What the processor has and its operating system saves, of that which our paths need.
#pragma once

namespace qlora::cpu {

struct Features {
  bool avx2 = false;    // with FMA and F16C
  bool avx512 = false;  // F, BW, DQ and VL
  bool avx512bf16 = false;
  bool neon = false;
  bool neonbf16 = false;
};

Features detect_features();

}  // namespace qlora::cpu
