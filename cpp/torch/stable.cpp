#include "stable.h"

#include "huge_pages.h"

namespace qlora::torch_ops {

Tensor empty_on(const Tensor& like, std::span<const std::int64_t> shape, ScalarType dtype) {
  std::vector<std::int64_t> strides(shape.size(), 1);
  for (std::size_t i = shape.size(); i-- > 1;) {
    strides[i - 1] = strides[i] * (shape[i] == 0 ? 1 : shape[i]);
  }
  std::int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<std::int64_t>(shape.size()), shape.data(), strides.data(),
      ::torch::stable::detail::to<std::int32_t>(::torch::stable::detail::from(dtype)), device_type,
      like.get_device_index(), &handle));
  const Tensor tensor(handle);
  if (tensor.is_cpu()) {
    advise_huge_pages(
        tensor.mutable_data_ptr(),
        static_cast<std::size_t>(tensor.numel()) * static_cast<std::size_t>(tensor.element_size()));
  }
  return tensor;
}

}  // namespace qlora::torch_ops
