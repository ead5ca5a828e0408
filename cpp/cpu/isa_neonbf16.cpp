#include "isa.h"
#include "kernels_inl.h"
#include "simd_neonbf16.h"

namespace qlora::cpu {

constinit const Backend neonbf16_backend = make_backend<NeonBf16>("cpu-neonbf16");

}  // namespace qlora::cpu
