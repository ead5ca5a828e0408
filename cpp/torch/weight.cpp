#include "weight.h"

namespace qlora::torch_ops {

WeightTensors::WeightTensors(const Checks& checks, const WeightArguments& weight,
                             const Tensor& first, const char* first_name, std::int64_t rows,
                             std::int64_t cols, std::int64_t blocksize, const std::string& format)
    : packed_(make_contiguous(weight.packed)), absmax_(make_contiguous(weight.absmax)) {
  checks.same_device(packed_, "packed", first, first_name);
  checks.same_device(absmax_, "absmax", first, first_name);
  const std::int64_t n = checks.product(rows, cols, "the weight [out_features, in_features]");
  const std::int64_t block = checks.blocksize(blocksize);
  const std::int64_t blocks = n_blocks(n, block);
  params_ = {.format = checks.format(format),
             .rows = rows,
             .cols = cols,
             .blocksize = block,
             .packed = static_cast<const std::uint8_t*>(packed_.const_data_ptr()),
             .scales = {}};

  checks.dtype(packed_, "packed", ScalarType::Byte);
  checks.numel(packed_, "packed", {"ceil(out_features*in_features/2)", packed_bytes(n)});

  if (weight.nested_absmax.has_value() != weight.nested_offset.has_value()) {
    const bool has_absmax = weight.nested_absmax.has_value();
    checks.fail(has_absmax ? "nested_offset" : "nested_absmax",
                has_absmax ? "be given together with nested_absmax"
                           : "be given together with nested_offset",
                "None");
  }
  if (!weight.nested_absmax.has_value()) {
    checks.dtype(absmax_, "absmax (without nested_absmax)", ScalarType::Float);
    checks.shape(absmax_, "absmax", {{"n_blocks", blocks}});
    params_.scales.absmax = static_cast<const float*>(absmax_.const_data_ptr());
    return;
  }
  checks.same_device(*weight.nested_absmax, "nested_absmax", first, first_name);
  checks.same_device(*weight.nested_offset, "nested_offset", first, first_name);
  nested_absmax_ = make_contiguous(*weight.nested_absmax);
  nested_offset_ = make_contiguous(*weight.nested_offset);
  params_.scales = nested_scales(checks, absmax_, "absmax (with nested_absmax)", *nested_absmax_,
                                 *nested_offset_, blocks);
}

Scales nested_scales(const Checks& checks, const Tensor& absmax_q8, const char* absmax_name,
                     const Tensor& nested_absmax, const Tensor& nested_offset, std::int64_t n) {
  checks.dtype(absmax_q8, absmax_name, ScalarType::Byte);
  checks.shape(absmax_q8, absmax_name, {{"n_blocks", n}});
  checks.dtype(nested_absmax, "nested_absmax", ScalarType::Float);
  checks.shape(nested_absmax, "nested_absmax",
               {{"ceil(n_blocks/256)", ceil_div(n, kNestedBlocksize)}});
  checks.dtype(nested_offset, "nested_offset", ScalarType::Float);
  checks.numel(nested_offset, "nested_offset", {"n_offsets", 1});
  return {.absmax_q8 = static_cast<const std::uint8_t*>(absmax_q8.const_data_ptr()),
          .nested_absmax = static_cast<const float*>(nested_absmax.const_data_ptr()),
          .nested_offset = static_cast<const float*>(nested_offset.const_data_ptr())};
}

}  // namespace qlora::torch_ops
