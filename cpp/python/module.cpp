// qlora_native._core: what Python asks of the build, of the processor and for paged memory. No
// tensor crosses here.
//
// Importing it loads libqlora_native, which registers the ops with torch; torch must be there
// first.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "../cpu/isa.h"
#include "linear_choices.h"
#include "paged_buffer.h"
#include "qlora_native/dynamic_map.h"
#include "qlora_native/format.h"
#include "qlora_native/runtime.h"

namespace py = pybind11;

namespace {

std::vector<std::string> names(const char* (*nth)(int)) {
  std::vector<std::string> list;
  for (int i = 0; nth(i) != nullptr; ++i) list.emplace_back(nth(i));
  return list;
}

std::string joined(const std::vector<std::string>& list) {
  std::string text;
  for (const std::string& name : list) text += (text.empty() ? "'" : ", '") + name + "'";
  return text;
}

std::vector<std::string> available_isas() { return names(qlora::cpu::available_isa); }

void force_isa(const std::optional<std::string>& name) {
  if (qlora::cpu::force_isa(name ? name->c_str() : nullptr)) return;
  throw std::invalid_argument("force_isa: name must be None or one that this processor runs (" +
                              joined(available_isas()) + "), got '" + *name + "'");
}

std::vector<float> codebook(std::string_view format_name) {
  const qlora::Format* format = qlora::find_format(format_name);
  if (format == nullptr) {
    throw std::invalid_argument("codebook: format must be one of " +
                                std::string(qlora::kFormatNames) + ", got '" +
                                std::string(format_name) + "'");
  }
  return {std::begin(format->values), std::end(format->values)};
}

std::vector<float> dynamic_map(bool is_signed) {
  const float* map = qlora::dynamic_map(is_signed);
  return {map, map + 256};
}

#if defined(QLORA_CUDA_COMPILER)
std::vector<std::string> cuda_ways(bool forward) {
  std::vector<std::string> list;
  for (int i = 0; const char* name = qlora::cuda_linear_way(forward, i); ++i) {
    list.emplace_back(name);
  }
  return list;
}

void force_cuda_linear(const std::optional<std::string>& forward,
                       const std::optional<std::string>& backward_input) {
  const auto force = [](bool is_forward, const std::optional<std::string>& name) {
    if (qlora::force_cuda_linear(is_forward, name ? name->c_str() : nullptr)) return;
    throw std::invalid_argument(
        std::string("force_cuda_linear: ") + (is_forward ? "forward" : "backward_input") +
        " must be None or one of " + joined(cuda_ways(is_forward)) + ", got '" + *name + "'");
  };
  force(true, forward);
  force(false, backward_input);
}

std::optional<std::string> last_cuda_linear_way(const std::string& direction) {
  const char* name = qlora::last_cuda_linear_way(qlora::python::is_forward(direction));
  return name != nullptr ? std::optional<std::string>(name) : std::nullopt;
}

void set_cuda_linear_choices(int device, const std::vector<qlora::python::ChoiceRow>& rows) {
  if (!qlora::set_cuda_linear_choices(device, qlora::python::as_choices(rows))) {
    throw std::invalid_argument("set_cuda_linear_choices: a row names a way that is not built");
  }
}
#endif

py::dict build_info() {
  py::dict info;
  info["compiler"] = QLORA_COMPILER;
  info["build_type"] = QLORA_BUILD_TYPE;
  info["torch_built_with"] = QLORA_TORCH_VERSION;
  info["torch_target"] = QLORA_TORCH_TARGET;
  info["isas_built"] = names(qlora::cpu::built_isa);
  info["isas_available"] = available_isas();
  info["isa"] = qlora::cpu::isa_name();
  info["huge_pages"] = qlora::huge_pages();
#if defined(QLORA_CUDA_COMPILER)
  info["cuda"] = "built; used for tensors on a GPU under a CUDA build of torch";
  info["cuda_compiler"] = QLORA_CUDA_COMPILER;
  info["cuda_architectures"] = QLORA_CUDA_ARCHITECTURES;
  info["cuda_linear_ways"] = cuda_ways(true);
  info["cuda_backward_input_ways"] = cuda_ways(false);
#else
  info["cuda"] = "no: this build has no CUDA kernels";
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Build information, instruction sets, codebooks and paged memory of qlora_native.";
  m.def("build_info", &build_info, "How this build was made and what it can use here.");
  m.def("num_threads", &qlora::num_threads, "Threads an op may use: torch.get_num_threads().");
  m.def("cpu_isa", &qlora::cpu::isa_name, "The instruction set in use.");
  m.def("available_isas", &available_isas, "Built and run by this processor, narrowest first.");
  m.def("force_isa", &force_isa, py::arg("name").none(true),
        "Use this instruction set from now on, process-wide; None for the widest.");
#if defined(QLORA_CUDA_COMPILER)
  m.def("force_cuda_linear", &force_cuda_linear, py::arg("forward").none(true),
        py::arg("backward_input").none(true),
        "Multiply by 4-bit weights on a GPU in that way alone, process-wide; None: by the table.");
  m.def("last_cuda_linear_way", &last_cuda_linear_way, py::arg("direction"),
        "The way that the latest call took, or None.");
  m.def("set_cuda_linear_choices", &set_cuda_linear_choices, py::arg("device"), py::arg("rows"),
        "What was measured on that device, in place of what it had: (direction, dtype, "
        "double_quant, n, k, blocksize, most_m, way) each.");
#endif
  m.def("codebook", &codebook, py::arg("format"), "The 16 values of 'nf4' or 'fp4', by code.");
  m.def("dynamic_map", &dynamic_map, py::arg("signed"),
        "The 256 values of the 8-bit map, by code.");
  qlora::python::define_paged_buffer(m);
}
