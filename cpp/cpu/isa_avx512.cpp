#include "isa.h"
#include "kernels_inl.h"
#include "simd_avx512.h"

namespace qlora::cpu {

constinit const Backend avx512_backend = make_backend<Avx512>("cpu-avx512");

}  // namespace qlora::cpu
