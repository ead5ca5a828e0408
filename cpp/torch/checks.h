// The checks at the edge: everything a backend relies on, told to the caller in one form:
//
//     qlora_native::<op>: <argument> must <expectation>, got <value>
//
// Each op checks in one order: device, number of dimensions, sizes, dtype, shape, strides, overlap.
// An error leaves as std::runtime_error, the only exception that torch's stable boundary carries;
// python/qlora_native/ops.py turns it into ValueError, or TypeError where the expectation is a
// dtype.
#pragma once

#include <initializer_list>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>

#include "qlora_native/format.h"
#include "qlora_native/layout.h"
#include "qlora_native/params.h"
#include "qlora_native/status.h"
#include "qlora_native/types.h"
#include "stable.h"

namespace qlora::torch_ops {

// A size and the name it bears in messages: {"n_blocks", 4096}.
struct Dim {
  const char* name;
  std::int64_t size;
};

std::string to_string(std::span<const std::int64_t> shape);
std::string to_string(std::span<const Dim> shape);
std::string dtype_name(ScalarType dtype);

// The checks of one op call; `op` opens every message.
class Checks {
 public:
  explicit constexpr Checks(const char* op) : op_(op) {}

  [[noreturn]] void fail(std::string_view argument, std::string_view expectation,
                         std::string_view value) const;
  void status(Status status) const;

  // All tensors of a call are on the device of the first one.
  void same_device(const Tensor& t, const char* name, const Tensor& first,
                   const char* first_name) const;

  void at_least_1d(const Tensor& t, const char* name) const;
  void shape(const Tensor& t, const char* name, std::span<const std::int64_t> wanted) const;
  void shape(const Tensor& t, const char* name, std::initializer_list<Dim> wanted) const;
  // Holds that many values in whatever shape: bitsandbytes keeps packed weights as [bytes, 1].
  void numel(const Tensor& t, const char* name, Dim wanted) const;

  void dtype(const Tensor& t, const char* name, ScalarType wanted) const;
  // float32, float16 or bfloat16, as the contract names them.
  DType float_dtype(const Tensor& t, const char* name) const;
  DType float_dtype(ScalarType dtype, const char* name) const;

  // What is written must be contiguous, and apart from what is read.
  void output(const Tensor& t, const char* name) const;
  void no_overlap(const Tensor& out, const char* out_name, const Tensor& in,
                  const char* in_name) const;

  std::int64_t size(std::int64_t value, const char* name) const;  // not negative
  std::int64_t product(std::int64_t a, std::int64_t b, const char* what) const;
  std::int64_t product(std::span<const std::int64_t> sizes, const char* what) const;
  std::int64_t blocksize(std::int64_t value) const;
  const Format& format(const std::string& name) const;
  CodeRounding rounding(const std::string& name) const;
  // low <= value < high; NaN is outside.
  void in_range(double value, const char* name, double low, double high) const;

 private:
  const char* op_;
};

inline ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return ScalarType::Float;
    case DType::float16:
      return ScalarType::Half;
    case DType::bfloat16:
      return ScalarType::BFloat16;
  }
  return ScalarType::Float;
}

}  // namespace qlora::torch_ops
