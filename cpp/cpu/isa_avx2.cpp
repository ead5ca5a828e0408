#include "isa.h"
#include "kernels_inl.h"
#include "simd_avx2.h"

namespace qlora::cpu {

constinit const Backend avx2_backend = make_backend<Avx2>("cpu-avx2");

}  // namespace qlora::cpu
