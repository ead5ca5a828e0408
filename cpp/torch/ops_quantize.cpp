// Quantization and back: 4-bit formats, the 8-bit dynamic maps, double quantization of scales.
#include "checks.h"
#include "device.h"
#include "ops.h"
#include "weight.h"

namespace qlora::torch_ops {
namespace {

// Dequantization does not care where rows end: any shape is a matrix [1, n] to it.
void run_dequantize_4bit(const Checks& checks, const WeightArguments& weight,
                         std::int64_t blocksize, const std::string& format, DType dtype,
                         const Tensor& out) {
  const WeightTensors tensors(checks, weight, out, "out", 1, out.numel(), blocksize, format);
  const Device device = device_of(out);
  const Dequantize4bitParams params{
      .weight = tensors.params(), .dtype = dtype, .out = out.mutable_data_ptr()};
  checks.status(device.backend.dequantize_4bit(params, device.context));
}

void run_quantize_4bit(const Checks& checks, const Tensor& x, DType dtype, std::int64_t blocksize,
                       const Format& format, const Tensor& packed, const Tensor& absmax) {
  const Device device = device_of(x);
  const Quantize4bitParams params{.format = format,
                                  .n = x.numel(),
                                  .blocksize = blocksize,
                                  .dtype = dtype,
                                  .x = x.const_data_ptr(),
                                  .packed = static_cast<std::uint8_t*>(packed.mutable_data_ptr()),
                                  .absmax = static_cast<float*>(absmax.mutable_data_ptr())};
  checks.status(device.backend.quantize_4bit(params, device.context));
}

void run_quantize_8bit(const Checks& checks, const Tensor& x, DType dtype, std::int64_t blocksize,
                       bool is_signed, CodeRounding rounding, const Tensor& codes,
                       const Tensor& absmax) {
  const Device device = device_of(x);
  const Quantize8bitParams params{.n = x.numel(),
                                  .blocksize = blocksize,
                                  .is_signed = is_signed,
                                  .rounding = rounding,
                                  .dtype = dtype,
                                  .x = x.const_data_ptr(),
                                  .codes = static_cast<std::uint8_t*>(codes.mutable_data_ptr()),
                                  .absmax = static_cast<float*>(absmax.mutable_data_ptr())};
  checks.status(device.backend.quantize_8bit(params, device.context));
}

void run_dequantize_8bit(const Checks& checks, const Tensor& codes, const Tensor& absmax,
                         std::int64_t blocksize, bool is_signed, DType dtype, const Tensor& out) {
  const Device device = device_of(codes);
  const Dequantize8bitParams params{
      .n = codes.numel(),
      .blocksize = blocksize,
      .is_signed = is_signed,
      .codes = static_cast<const std::uint8_t*>(codes.const_data_ptr()),
      .absmax = static_cast<const float*>(absmax.const_data_ptr()),
      .dtype = dtype,
      .out = out.mutable_data_ptr()};
  checks.status(device.backend.dequantize_8bit(params, device.context));
}

// What both overloads of dequantize_8bit ask of their inputs.
void check_codes(const Checks& checks, const Tensor& codes, const Tensor& absmax,
                 std::int64_t blocksize) {
  checks.same_device(absmax, "absmax", codes, "codes");
  checks.blocksize(blocksize);
  checks.dtype(codes, "codes", ScalarType::Byte);
  checks.dtype(absmax, "absmax", ScalarType::Float);
  checks.shape(absmax, "absmax", {{"n_blocks", n_blocks(codes.numel(), blocksize)}});
}

}  // namespace

std::tuple<Tensor, Tensor> quantize_4bit(Tensor x, std::int64_t blocksize, std::string format) {
  const Checks checks("quantize_4bit");
  checks.blocksize(blocksize);
  const Format& checked_format = checks.format(format);
  const DType dtype = checks.float_dtype(x, "x");
  x = make_contiguous(x);
  Tensor packed = empty_on(x, packed_bytes(x.numel()), ScalarType::Byte);
  Tensor absmax = empty_on(x, n_blocks(x.numel(), blocksize), ScalarType::Float);
  run_quantize_4bit(checks, x, dtype, blocksize, checked_format, packed, absmax);
  return {packed, absmax};
}

void quantize_4bit_out(Tensor x, std::int64_t blocksize, std::string format, Tensor packed,
                       Tensor absmax) {
  const Checks checks("quantize_4bit.out");
  checks.same_device(packed, "packed", x, "x");
  checks.same_device(absmax, "absmax", x, "x");
  checks.blocksize(blocksize);
  const Format& checked_format = checks.format(format);
  const DType dtype = checks.float_dtype(x, "x");
  checks.dtype(packed, "packed", ScalarType::Byte);
  checks.dtype(absmax, "absmax", ScalarType::Float);
  checks.numel(packed, "packed", {"ceil(n/2)", packed_bytes(x.numel())});
  checks.shape(absmax, "absmax", {{"n_blocks", n_blocks(x.numel(), blocksize)}});
  checks.output(packed, "packed");
  checks.output(absmax, "absmax");
  x = make_contiguous(x);
  checks.no_overlap(packed, "packed", x, "x");
  checks.no_overlap(absmax, "absmax", x, "x");
  checks.no_overlap(packed, "packed", absmax, "absmax");
  run_quantize_4bit(checks, x, dtype, blocksize, checked_format, packed, absmax);
}

Tensor dequantize_4bit(Tensor packed, Tensor absmax, OptionalTensor nested_absmax,
                       OptionalTensor nested_offset, Shape shape, std::int64_t blocksize,
                       std::string format, ScalarType dtype) {
  const Checks checks("dequantize_4bit");
  checks.product(shape, "shape");
  const DType out_dtype = checks.float_dtype(dtype, "dtype");
  // Checked before it is allocated: a wrong shape must not ask for terabytes.
  checks.numel(packed, "packed",
               {"ceil(numel(shape)/2)", packed_bytes(checks.product(shape, "shape"))});
  const Tensor out = empty_on(packed, shape, dtype);
  run_dequantize_4bit(checks, {packed, absmax, nested_absmax, nested_offset}, blocksize, format,
                      out_dtype, out);
  return out;
}

void dequantize_4bit_out(Tensor packed, Tensor absmax, OptionalTensor nested_absmax,
                         OptionalTensor nested_offset, std::int64_t blocksize, std::string format,
                         Tensor out) {
  const Checks checks("dequantize_4bit.out");
  const DType dtype = checks.float_dtype(out, "out");
  checks.output(out, "out");
  checks.no_overlap(out, "out", packed, "packed");
  checks.no_overlap(out, "out", absmax, "absmax");
  if (nested_absmax.has_value()) checks.no_overlap(out, "out", *nested_absmax, "nested_absmax");
  if (nested_offset.has_value()) checks.no_overlap(out, "out", *nested_offset, "nested_offset");
  run_dequantize_4bit(checks, {packed, absmax, nested_absmax, nested_offset}, blocksize, format,
                      dtype, out);
}

std::tuple<Tensor, Tensor> quantize_8bit(Tensor x, std::int64_t blocksize, bool is_signed,
                                         std::string rounding) {
  const Checks checks("quantize_8bit");
  checks.blocksize(blocksize);
  const CodeRounding code_rounding = checks.rounding(rounding);
  const DType dtype = checks.float_dtype(x, "x");
  x = make_contiguous(x);
  Tensor codes = empty_on(x, sizes_of(x), ScalarType::Byte);
  Tensor absmax = empty_on(x, n_blocks(x.numel(), blocksize), ScalarType::Float);
  run_quantize_8bit(checks, x, dtype, blocksize, is_signed, code_rounding, codes, absmax);
  return {codes, absmax};
}

void quantize_8bit_out(Tensor x, std::int64_t blocksize, bool is_signed, std::string rounding,
                       Tensor codes, Tensor absmax) {
  const Checks checks("quantize_8bit.out");
  checks.same_device(codes, "codes", x, "x");
  checks.same_device(absmax, "absmax", x, "x");
  checks.blocksize(blocksize);
  const CodeRounding code_rounding = checks.rounding(rounding);
  const DType dtype = checks.float_dtype(x, "x");
  checks.dtype(codes, "codes", ScalarType::Byte);
  checks.dtype(absmax, "absmax", ScalarType::Float);
  checks.shape(codes, "codes", sizes_of(x));
  checks.shape(absmax, "absmax", {{"n_blocks", n_blocks(x.numel(), blocksize)}});
  checks.output(codes, "codes");
  checks.output(absmax, "absmax");
  x = make_contiguous(x);
  checks.no_overlap(codes, "codes", x, "x");
  checks.no_overlap(absmax, "absmax", x, "x");
  checks.no_overlap(codes, "codes", absmax, "absmax");
  run_quantize_8bit(checks, x, dtype, blocksize, is_signed, code_rounding, codes, absmax);
}

Tensor dequantize_8bit(Tensor codes, Tensor absmax, std::int64_t blocksize, bool is_signed,
                       ScalarType dtype) {
  const Checks checks("dequantize_8bit");
  check_codes(checks, codes, absmax, blocksize);
  const DType out_dtype = checks.float_dtype(dtype, "dtype");
  const Tensor out = empty_on(codes, sizes_of(codes), dtype);
  run_dequantize_8bit(checks, make_contiguous(codes), make_contiguous(absmax), blocksize, is_signed,
                      out_dtype, out);
  return out;
}

void dequantize_8bit_out(Tensor codes, Tensor absmax, std::int64_t blocksize, bool is_signed,
                         Tensor out) {
  const Checks checks("dequantize_8bit.out");
  check_codes(checks, codes, absmax, blocksize);
  checks.same_device(out, "out", codes, "codes");
  const DType dtype = checks.float_dtype(out, "out");
  checks.shape(out, "out", sizes_of(codes));
  checks.output(out, "out");
  codes = make_contiguous(codes);
  absmax = make_contiguous(absmax);
  checks.no_overlap(out, "out", codes, "codes");
  checks.no_overlap(out, "out", absmax, "absmax");
  run_dequantize_8bit(checks, codes, absmax, blocksize, is_signed, dtype, out);
}

std::tuple<Tensor, Tensor, Tensor> quantize_scales(Tensor absmax, std::string rounding,
                                                   OptionalTensor offset) {
  const Checks checks("quantize_scales");
  const CodeRounding code_rounding = checks.rounding(rounding);
  const std::int64_t n = absmax.numel();
  checks.dtype(absmax, "absmax", ScalarType::Float);
  checks.shape(absmax, "absmax", {{"n_blocks", n}});
  absmax = make_contiguous(absmax);
  if (offset.has_value()) {
    checks.same_device(*offset, "offset", absmax, "absmax");
    checks.dtype(*offset, "offset", ScalarType::Float);
    checks.numel(*offset, "offset", {"n", 1});
  }
  Tensor absmax_q8 = empty_on(absmax, n, ScalarType::Byte);
  Tensor nested_absmax = empty_on(absmax, ceil_div(n, kNestedBlocksize), ScalarType::Float);
  Tensor nested_offset = empty_on(absmax, 1, ScalarType::Float);
  const Device device = device_of(absmax);
  const QuantizeScalesParams params{
      .n = n,
      .rounding = code_rounding,
      .absmax = static_cast<const float*>(absmax.const_data_ptr()),
      .offset = offset.has_value() ? static_cast<const float*>(offset->const_data_ptr()) : nullptr,
      .absmax_q8 = static_cast<std::uint8_t*>(absmax_q8.mutable_data_ptr()),
      .nested_absmax = static_cast<float*>(nested_absmax.mutable_data_ptr()),
      .nested_offset = static_cast<float*>(nested_offset.mutable_data_ptr())};
  checks.status(device.backend.quantize_scales(params, device.context));
  return {absmax_q8, nested_absmax, nested_offset};
}

Tensor dequantize_scales(Tensor absmax_q8, Tensor nested_absmax, Tensor nested_offset) {
  const Checks checks("dequantize_scales");
  checks.same_device(nested_absmax, "nested_absmax", absmax_q8, "absmax_q8");
  checks.same_device(nested_offset, "nested_offset", absmax_q8, "absmax_q8");
  absmax_q8 = make_contiguous(absmax_q8);
  nested_absmax = make_contiguous(nested_absmax);
  nested_offset = make_contiguous(nested_offset);
  const std::int64_t n = absmax_q8.numel();
  const Scales scales =
      nested_scales(checks, absmax_q8, "absmax_q8", nested_absmax, nested_offset, n);
  Tensor absmax = empty_on(absmax_q8, n, ScalarType::Float);
  const Device device = device_of(absmax_q8);
  const DequantizeScalesParams params{
      .n = n, .scales = scales, .absmax = static_cast<float*>(absmax.mutable_data_ptr())};
  checks.status(device.backend.dequantize_scales(params, device.context));
  return absmax;
}

}  // namespace qlora::torch_ops
