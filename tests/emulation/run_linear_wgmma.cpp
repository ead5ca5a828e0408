// run_product.h for linear_wgmma: three panels of codes, of which one takes another's place, in
// both directions; two of LoRA's steps; two tiles down and across, tails of rows and columns.
#include "run_product.h"

int main() {
  using namespace emulated_run;
  emulation::Machine::instance().set_architecture(90);
  run_all<cuda::linear_wgmma, cuda::backward_input_wgmma>({
      {9, 24, 736, 64, true, DType::bfloat16, 80, 0.25f},
      {70, 552, 64, 32, true, DType::bfloat16, 0, 0.25f},
      {130, 264, 96, 128, false, DType::float16, 16, 0.5f},
  });
}
