// torch's stable ABI, and nothing else of torch: what lets one build run on every torch from 2.10
// on.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace qlora::torch_ops {

using ::torch::headeronly::ScalarType;
using ::torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::span<const std::int64_t> sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.data(), sizes.size()};
}

// An uninitialised contiguous tensor on the device of `like`. Straight to torch's allocation: the
// way through the dispatcher (stable::new_empty) takes three times as long.
Tensor empty_on(const Tensor& like, std::span<const std::int64_t> shape, ScalarType dtype);

inline Tensor empty_on(const Tensor& like, std::int64_t size, ScalarType dtype) {
  return empty_on(like, std::span<const std::int64_t>(&size, 1), dtype);
}

inline Tensor make_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : ::torch::stable::contiguous(t);
}

inline OptionalTensor make_contiguous(const OptionalTensor& t) {
  return t.has_value() ? OptionalTensor(make_contiguous(*t)) : OptionalTensor();
}

// `t` in the host's memory, contiguous; waits for a device that still computes it.
inline Tensor on_host(const Tensor& t) {
  return make_contiguous(
      ::torch::stable::to(t, ::torch::stable::Device(::torch::headeronly::DeviceType::CPU)));
}

}  // namespace qlora::torch_ops
