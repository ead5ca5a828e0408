#include "isa.h"
#include "kernels_inl.h"
#include "simd_avx512.h"

namespace qlora::cpu {

constinit const Backend avx512bf16_backend = make_backend<Avx512Bf16>("cpu-avx512bf16");

}  // namespace qlora::cpu
