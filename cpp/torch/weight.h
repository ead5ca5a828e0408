// A 4-bit weight as it travels through the ops (packed, absmax, nested_absmax, nested_offset),
// checked, and held while a backend reads it.
#pragma once

#include <string>

#include "checks.h"
#include "qlora_native/params.h"
#include "stable.h"

namespace qlora::torch_ops {

// The four tensors as an op receives them. Double-quantized scales are uint8 absmax with both
// nested tensors; plain ones are float32 absmax with neither.
struct WeightArguments {
  const Tensor& packed;
  const Tensor& absmax;
  const OptionalTensor& nested_absmax;
  const OptionalTensor& nested_offset;
};

class WeightTensors {
 public:
  // `first` is the op's first tensor, whose device the weight must share.
  WeightTensors(const Checks& checks, const WeightArguments& weight, const Tensor& first,
                const char* first_name, std::int64_t rows, std::int64_t cols,
                std::int64_t blocksize, const std::string& format);

  [[nodiscard]] const Weight4bit& params() const { return params_; }

 private:
  // Contiguous copies where the caller's tensors were not contiguous, the same tensors otherwise.
  Tensor packed_;
  Tensor absmax_;
  OptionalTensor nested_absmax_;
  OptionalTensor nested_offset_;
  Weight4bit params_;
};

// Double-quantized scales [n], checked; the pointers live as long as the tensors do, which must be
// contiguous already.
Scales nested_scales(const Checks& checks, const Tensor& absmax_q8, const char* absmax_name,
                     const Tensor& nested_absmax, const Tensor& nested_offset, std::int64_t n);

}  // namespace qlora::torch_ops
