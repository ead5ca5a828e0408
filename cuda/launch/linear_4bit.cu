// linear_4bit and linear_4bit_backward_input: the base product alone, by whichever way.
#include "launch/launchers.h"
#include "launch/linear_paths.h"

namespace qlora::cuda {

Status linear_4bit(const LinearParams& p, const Context& context) {
  return linear_by_any_way(p, nullptr, context);
}

Status linear_4bit_backward_input(const LinearBackwardInputParams& p, const Context& context) {
  return backward_input_by_any_way(p, nullptr, context);
}

}  // namespace qlora::cuda
