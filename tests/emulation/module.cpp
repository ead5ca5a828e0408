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
#include "paging/pagers.h"
#include "qlora_native/paging.h"
#include "qlora_native/runtime.h"
#include "runtime.h"

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

// ---- the runtime under the pagers ----

emulation::Runtime& runtime() { return emulation::Runtime::instance(); }

void set_schedule(const std::string& name, std::uint64_t seed) {
  using Schedule = emulation::Streams::Schedule;
  runtime().streams().set_schedule(name == "early"  ? Schedule::early
                                   : name == "late" ? Schedule::late
                                                    : Schedule::drawn,
                                   seed);
}

void fail(const std::string& which, int n) {
  runtime().fail(which == "copy"         ? emulation::Call::copy
                 : which == "allocation" ? emulation::Call::allocation
                                         : emulation::Call::any,
                 n);
}

void define_runtime(py::module_& m) {
  m.def("set_schedule", &set_schedule, py::arg("name"), py::arg("seed") = 0,
        "Do copies \"early\", \"late\", or when it is \"drawn\" from the seed.");
  m.def("fail", &fail, py::arg("which"), py::arg("n"),
        "The n-th \"copy\", \"allocation\" or \"any\" call from now on fails; 0: none.");
  m.def(
      "set_device_bytes", [](std::int64_t n) { runtime().set_device_bytes(n); }, py::arg("bytes"),
      "Of the device that pagers take memory of; 1 GiB at first.");
  m.def(
      "set_concurrent_managed_access",
      [](bool has) { runtime().set_concurrent_managed_access(has); }, py::arg("has"),
      "Whether managed memory can be paged.");
  m.def(
      "take_faults", [] { return runtime().take_faults(); },
      "What was wrong with calls of the runtime since the last time, in words.");
  m.def(
      "alive", [] { return runtime().alive(); },
      "Allocations, streams and events that are not freed.");
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
  define_runtime(m);
  qlora::add_pager(qlora::cuda::managed_pager());
  qlora::add_pager(qlora::cuda::staged_pager());
  m.def("counts", &counts, "What the launches since then moved (counters.h).");
}
