// qlora_native._emulation: lets the op tests run the CUDA kernels on the emulator, on CPU tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "backend.h"
#include "counters.h"
#include "launch/linear_paths.h"
#include "linear_choices.h"
#include "machine.h"
#include "qlora_native/runtime.h"

namespace py = pybind11;

namespace {

using qlora::cuda::Direction;

Direction direction(const std::string& name) {
  return qlora::python::is_forward(name) ? Direction::forward : Direction::backward_input;
}

void force_way(const std::string& of, const std::optional<std::string>& name) {
  if (!qlora::cuda::force_way(direction(of), name ? name->c_str() : nullptr)) {
    throw py::value_error("no such way: '" + *name + "'");
  }
}

std::vector<std::string> ways(const std::string& of) {
  std::vector<std::string> names;
  for (int i = 0; const char* name = qlora::cuda::way_name(direction(of), i); ++i) {
    names.emplace_back(name);
  }
  return names;
}

std::optional<std::string> last_way(const std::string& of) {
  const char* name = qlora::cuda::last_way(direction(of));
  return name != nullptr ? std::optional<std::string>(name) : std::nullopt;
}

void set_choices(int device, const std::vector<qlora::python::ChoiceRow>& rows) {
  if (!qlora::cuda::set_choices(device, qlora::python::as_choices(rows))) {
    throw py::value_error("a row names a way that is not built");
  }
}

void use(bool on) { qlora::serve_host_tensors_by(on ? &qlora::cuda::backend() : nullptr); }

py::dict counts() {
  const emulation::Counts& counts = emulation::counters().counts();
  py::dict result;
  result["loaded_bytes"] = counts.loaded_bytes;
  result["loaded_sectors"] = counts.loaded_sectors;
  result["stored_bytes"] = counts.stored_bytes;
  result["stored_sectors"] = counts.stored_sectors;
  result["global_instructions"] = counts.global_instructions;
  result["shared_instructions"] = counts.shared_instructions;
  result["shared_passes"] = counts.shared_passes;
  result["bank_conflicts"] = counts.bank_conflicts;
  result["tensor_flops"] = counts.tensor_flops;
  return result;
}

void count(bool on) {
  emulation::counters().reset();
  emulation::counters().enable(on);
}

}  // namespace

PYBIND11_MODULE(_emulation, m) {
  m.doc() = "The CUDA kernels, compiled for the host and run thread by thread (docs/emulation.md).";
  m.attr("name") = qlora::cuda::backend().name;
  m.def("use", &use, py::arg("on"),
        "Serve CPU tensors by the emulated CUDA backend, or no longer.");
  m.def(
      "set_seed", [](std::uint64_t seed) { emulation::Machine::instance().set_seed(seed); },
      py::arg("seed"), "Draw the order in which threads run from this seed; 0: ascending.");
  m.def(
      "set_architecture",
      [](int number) { emulation::Machine::instance().set_architecture(number); },
      py::arg("number"), "Pretend to be a card of that compute capability: 75, 80, …, 120.");
  m.def("ways", &ways, py::arg("direction"), "The ways in which a 4-bit product can be computed.");
  m.def("force_way", &force_way, py::arg("direction"), py::arg("name").none(true),
        "Take that way in each call from now on; None: the table chooses again.");
  m.def("last_way", &last_way, py::arg("direction"), "The way that the latest call took, or None.");
  m.def("set_choices", &set_choices, py::arg("device"), py::arg("rows"),
        "What was measured on that device: _core.set_cuda_linear_choices.");
  m.def(
      "only_ends", [](std::int64_t n) { emulation::Machine::instance().set_only_ends(n); },
      py::arg("blocks"), "Run only so many blocks at either end of a grid; 0: all.");
  m.def("count", &count, py::arg("on"), "Start counting from zero, or stop.");
  m.def("counts", &counts, "What the launches since then moved (counters.h).");
}
