#include "checks.h"

#include <cmath>
#include <limits>
#include <sstream>

namespace qlora::torch_ops {
namespace {

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

std::string device_name(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  if (t.is_cuda()) return concat("cuda:", t.get_device_index());
  return "another kind of device";
}

const char* code_name(StatusCode code) {
  switch (code) {
    case StatusCode::ok:
      return "ok";
    case StatusCode::invalid_argument:
      return "invalid argument";
    case StatusCode::unsupported:
      return "unsupported";
    case StatusCode::out_of_memory:
      return "out of memory";
    case StatusCode::device:
      return "device error";
  }
  return "unknown status";
}

}  // namespace

std::string to_string(std::span<const std::int64_t> shape) {
  std::string text = "[";
  for (const std::int64_t size : shape) {
    if (text.size() > 1) text += ", ";
    text += std::to_string(size);
  }
  return text + "]";
}

std::string to_string(std::span<const Dim> shape) {
  std::string text = "[";
  for (const Dim& dim : shape) {
    if (text.size() > 1) text += ", ";
    text += concat(dim.name, "=", dim.size);
  }
  return text + "]";
}

std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::BFloat16:
      return "bfloat16";
    default:
      return ::torch::headeronly::toString(dtype);
  }
}

void Checks::fail(std::string_view argument, std::string_view expectation,
                  std::string_view value) const {
  throw std::runtime_error(
      concat("qlora_native::", op_, ": ", argument, " must ", expectation, ", got ", value));
}

void Checks::status(Status status) const {
  if (status.ok()) return;
  throw std::runtime_error(
      concat("qlora_native::", op_, " failed (", code_name(status.code), "): ", status.message));
}

void Checks::same_device(const Tensor& t, const char* name, const Tensor& first,
                         const char* first_name) const {
  if (t.is_cpu() && first.is_cpu()) return;
  const bool same_kind = t.is_cpu() == first.is_cpu() && t.is_cuda() == first.is_cuda();
  if (same_kind && t.get_device_index() == first.get_device_index()) return;
  fail(name, concat("be on ", device_name(first), ", where ", first_name, " is"), device_name(t));
}

void Checks::at_least_1d(const Tensor& t, const char* name) const {
  if (t.dim() == 0) fail(name, "have at least one dimension", "a scalar tensor");
}

void Checks::shape(const Tensor& t, const char* name, std::span<const std::int64_t> wanted) const {
  const auto got = sizes_of(t);
  bool equal = got.size() == wanted.size();
  for (std::size_t i = 0; equal && i < got.size(); ++i) equal = got[i] == wanted[i];
  if (!equal) fail(name, concat("have shape ", to_string(wanted)), to_string(got));
}

void Checks::shape(const Tensor& t, const char* name, std::initializer_list<Dim> wanted) const {
  const auto got = sizes_of(t);
  bool equal = got.size() == wanted.size();
  for (std::size_t i = 0; equal && i < got.size(); ++i) equal = got[i] == wanted.begin()[i].size;
  if (equal) return;
  const std::span<const Dim> dims(wanted.begin(), wanted.size());
  fail(name, concat("have shape ", to_string(dims)), to_string(got));
}

void Checks::numel(const Tensor& t, const char* name, Dim wanted) const {
  if (t.numel() == wanted.size) return;
  fail(name, concat("hold ", wanted.name, "=", wanted.size, " values"),
       concat("shape ", to_string(sizes_of(t))));
}

void Checks::dtype(const Tensor& t, const char* name, ScalarType wanted) const {
  if (t.scalar_type() == wanted) return;
  fail(name, concat("have dtype ", dtype_name(wanted)), dtype_name(t.scalar_type()));
}

DType Checks::float_dtype(const Tensor& t, const char* name) const {
  return float_dtype(t.scalar_type(), name);
}

DType Checks::float_dtype(ScalarType dtype, const char* name) const {
  switch (dtype) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    default:
      fail(name, "have dtype float32, float16 or bfloat16", dtype_name(dtype));
  }
}

void Checks::output(const Tensor& t, const char* name) const {
  if (t.is_contiguous()) return;
  const auto strides = t.strides();
  fail(name, "be contiguous, as it is written in place",
       concat("shape ", to_string(sizes_of(t)), " with strides ",
              to_string(std::span<const std::int64_t>(strides.data(), strides.size()))));
}

void Checks::no_overlap(const Tensor& out, const char* out_name, const Tensor& in,
                        const char* in_name) const {
  const auto begin = [](const Tensor& t) {
    return reinterpret_cast<std::uintptr_t>(t.const_data_ptr());
  };
  const auto end = [&](const Tensor& t) {
    return begin(t) + static_cast<std::uintptr_t>(t.numel()) * t.element_size();
  };
  if (begin(out) < end(in) && begin(in) < end(out)) {
    fail(out_name, concat("not share memory with ", in_name), "overlapping tensors");
  }
}

std::int64_t Checks::size(std::int64_t value, const char* name) const {
  if (value < 0) fail(name, "be 0 or more", std::to_string(value));
  return value;
}

std::int64_t Checks::product(std::int64_t a, std::int64_t b, const char* what) const {
  // Half the range is kept free, so that rounding up to whole blocks cannot overflow either.
  std::int64_t result = 0;
  const bool overflows = __builtin_mul_overflow(a, b, &result);
  if (overflows || result > std::numeric_limits<std::int64_t>::max() / 2) {
    fail(what, "stay below 2^62 values", concat(a, " x ", b));
  }
  return result;
}

std::int64_t Checks::product(std::span<const std::int64_t> sizes, const char* what) const {
  std::int64_t result = 1;
  for (const std::int64_t size : sizes) result = product(result, this->size(size, what), what);
  return result;
}

std::int64_t Checks::blocksize(std::int64_t value) const {
  if (!is_valid_blocksize(value)) {
    fail("blocksize", concat("be a power of two from ", kMinBlocksize, " to ", kMaxBlocksize),
         std::to_string(value));
  }
  return value;
}

const Format& Checks::format(const std::string& name) const {
  const Format* format = find_format(name);
  if (format == nullptr) fail("format", concat("be one of ", kFormatNames), concat("'", name, "'"));
  return *format;
}

CodeRounding Checks::rounding(const std::string& name) const {
  if (name == "nearest") return CodeRounding::nearest;
  if (name == "bitsandbytes_cpu") return CodeRounding::bitsandbytes_cpu;
  fail("rounding", "be one of 'nearest', 'bitsandbytes_cpu'", concat("'", name, "'"));
}

void Checks::in_range(double value, const char* name, double low, double high) const {
  if (value >= low && value < high) return;
  fail(name,
       std::isinf(high) ? concat("be finite and ", low, " or more")
                        : concat("be in [", low, ", ", high, ")"),
       concat(value));
}

}  // namespace qlora::torch_ops
