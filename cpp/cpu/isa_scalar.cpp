#include "isa.h"
#include "kernels_inl.h"
#include "simd_scalar.h"

namespace qlora::cpu {

constinit const Backend scalar_backend = make_backend<Scalar>("cpu-scalar");

}  // namespace qlora::cpu
