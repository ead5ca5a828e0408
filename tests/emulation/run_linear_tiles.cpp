// run_product.h for linear_tiles: more steps than the ring holds and a tail in both directions; two
// of LoRA's panels; tiles of 64 and of 128 rows, a tail of rows.
#include "run_product.h"

int main() {
  using namespace emulated_run;
  run_all<cuda::linear_tiles, cuda::backward_input_tiles>({
      {20, 296, 352, 64, true, DType::bfloat16, 80, 0.25f},
      {70, 136, 160, 32, false, DType::float16, 0, 0.0f},
      {9, 72, 96, 128, true, DType::bfloat16, 0, 0.0f},
  });
}
