#include "isa.h"
#include "kernels_inl.h"
#include "simd_neon.h"

namespace qlora::cpu {

constinit const Backend neon_backend = make_backend<Neon>("cpu-neon");

}  // namespace qlora::cpu
