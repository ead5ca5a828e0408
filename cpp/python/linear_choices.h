// What Python says of the ways of the 4-bit product, as C++ has it.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "qlora_native/linear_choice.h"

namespace qlora::python {

// Whether it is "forward"; ValueError where it is no direction.
inline bool is_forward(const std::string& direction) {
  if (direction == "forward") return true;
  if (direction == "backward_input") return false;
  throw pybind11::value_error("direction must be 'forward' or 'backward_input', got '" + direction +
                              "'");
}

inline DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::float32;
  if (name == "float16") return DType::float16;
  if (name == "bfloat16") return DType::bfloat16;
  throw pybind11::value_error("dtype must be 'float32', 'float16' or 'bfloat16', got '" + name +
                              "'");
}

// direction, dtype, double_quant, n, k, blocksize, most_m, way
using ChoiceRow = std::tuple<std::string, std::string, bool, std::int64_t, std::int64_t,
                             std::int64_t, std::int64_t, std::string>;

// They point into the rows.
inline std::vector<LinearChoice> as_choices(const std::vector<ChoiceRow>& rows) {
  std::vector<LinearChoice> choices;
  choices.reserve(rows.size());
  for (const auto& [direction, dtype, double_quant, n, k, blocksize, most_m, way] : rows) {
    choices.push_back({is_forward(direction), dtype_of(dtype), double_quant, n, k, blocksize,
                       most_m, way.c_str()});
  }
  return choices;
}

}  // namespace qlora::python
