#include "paged_buffer.h"

#include <pybind11/stl.h>

#include <cerrno>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "dlpack.h"
#include "qlora_native/paging.h"

namespace py = pybind11;

namespace qlora::python {
namespace {

// What a capsule owns until torch takes it over, and torch then.
struct Export {
  dlpack::ManagedTensor managed;
  std::int64_t shape;
  py::object owner;
};

// Called by whoever holds the tensor last, perhaps without Python's lock; perhaps after Python.
void delete_export(dlpack::ManagedTensor* managed) {
  if (Py_IsInitialized() == 0) return;
  const py::gil_scoped_acquire lock;
  delete static_cast<Export*>(managed->context);
}

void delete_capsule(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, "dltensor") == 0) return;  // taken over
  delete_export(static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor")));
}

// Bytes at an address. It keeps its buffer alive, and so does every tensor made of it.
struct PagedBytes {
  py::object buffer;
  std::uintptr_t address;
  std::int64_t bytes;
  dlpack::Device device;

  [[nodiscard]] PagedBytes part(std::int64_t begin, std::int64_t n) const {
    if (begin >= 0 && n >= 0 && n <= bytes - begin) {
      return {buffer, address + static_cast<std::uintptr_t>(begin), n, device};
    }
    throw py::value_error("the part must be within " + std::to_string(bytes) +
                          " bytes, got begin " + std::to_string(begin) + ", bytes " +
                          std::to_string(n));
  }

  [[nodiscard]] py::capsule capsule() const {
    auto made = std::make_unique<Export>();
    made->shape = bytes;
    made->owner = buffer;
    made->managed = {.tensor = {.data = reinterpret_cast<void*>(address),
                                .device = device,
                                .ndim = 1,
                                .dtype = {.code = 1, .bits = 8, .lanes = 1},
                                .shape = &made->shape,
                                .strides = nullptr,
                                .byte_offset = 0},
                     .context = made.get(),
                     .deleter = delete_export};
    PyObject* const capsule = PyCapsule_New(&made->managed, "dltensor", delete_capsule);
    if (capsule == nullptr) throw py::error_already_set();
    made.release();  // NOLINT: the capsule's now
    return py::reinterpret_steal<py::capsule>(capsule);
  }
};

[[noreturn]] void raise(PyObject* type, const std::string& message) {
  PyErr_SetString(type, message.c_str());
  throw py::error_already_set();
}

std::string names_of_pagers() {
  std::string names;
  for (int i = 0; pager(i) != nullptr; ++i) {
    names += (names.empty() ? "'" : ", '") + std::string(pager(i)->name) + "'";
  }
  return names;
}

const Pager& pager_named(const std::string& name) {
  const Pager* const found = find_pager(name.c_str());
  if (found == nullptr) {
    throw py::value_error("pager must be one of " + names_of_pagers() + ", got '" + name + "'");
  }
  return *found;
}

class PagedBuffer {
 public:
  PagedBuffer(const std::string& name, std::int64_t bytes, int device,
              const std::optional<std::string>& directory, std::int64_t window_bytes,
              bool oversubscribe)
      : pager_(pager_named(name)), device_(device), bytes_(bytes) {
    if (bytes <= 0) {
      throw py::value_error("bytes must be more than 0, got " + std::to_string(bytes));
    }
    if (window_bytes < 0) {
      throw py::value_error("window_bytes must not be negative, got " +
                            std::to_string(window_bytes));
    }
    const PagedParams params{.bytes = bytes,
                             .device = device,
                             .directory = directory ? directory->c_str() : nullptr,
                             .window_bytes = window_bytes,
                             .oversubscribe = oversubscribe};
    errno = 0;
    Status status;
    {
      const py::gil_scoped_release unlocked;
      status = pager_.open(params, &buffer_);
    }
    if (!status.ok()) raise_open(status, errno, directory);
  }
  PagedBuffer(const PagedBuffer&) = delete;
  PagedBuffer& operator=(const PagedBuffer&) = delete;
  ~PagedBuffer() {
    const py::gil_scoped_release unlocked;
    pager_.close(buffer_);
  }

  [[nodiscard]] const char* name() const { return pager_.name; }
  [[nodiscard]] std::int64_t bytes() const { return bytes_; }

  static PagedBytes host_view(const py::object& self) {
    auto& buffer = self.cast<PagedBuffer&>();
    void* address = nullptr;
    buffer.call([&] { return buffer.pager_.host_view(buffer.buffer_, &address); });
    return {self, reinterpret_cast<std::uintptr_t>(address), buffer.bytes_, {dlpack::kCpu, 0}};
  }

  static PagedBytes acquire(const py::object& self, std::int64_t begin, std::int64_t bytes,
                            std::uintptr_t stream) {
    auto& buffer = self.cast<PagedBuffer&>();
    buffer.check_range(begin, bytes);
    void* address = nullptr;
    buffer.call([&] {
      return buffer.pager_.acquire(buffer.buffer_, begin, bytes, reinterpret_cast<void*>(stream),
                                   &address);
    });
    const dlpack::Device device = buffer.pager_.on_device
                                      ? dlpack::Device{dlpack::kCuda, buffer.device_}
                                      : dlpack::Device{dlpack::kCpu, 0};
    return {self, reinterpret_cast<std::uintptr_t>(address), bytes, device};
  }

  void prefetch(std::int64_t begin, std::int64_t bytes, std::uintptr_t stream) {
    check_range(begin, bytes);
    call([&] { return pager_.prefetch(buffer_, begin, bytes, reinterpret_cast<void*>(stream)); });
  }

  void release(std::int64_t begin, std::int64_t bytes, std::uintptr_t stream, bool modified) {
    check_range(begin, bytes);
    call([&] {
      return pager_.release(buffer_, begin, bytes, reinterpret_cast<void*>(stream), modified);
    });
  }

  void evict(std::int64_t begin, std::int64_t bytes, std::uintptr_t stream) {
    check_range(begin, bytes);
    call([&] { return pager_.evict(buffer_, begin, bytes, reinterpret_cast<void*>(stream)); });
  }

  void settle() {
    call([&] { return pager_.settle(buffer_); });
  }

  py::dict stats() {
    PagedStats stats;
    call([&] { return pager_.stats(buffer_, &stats); });
    py::dict result;
    result["bytes"] = stats.bytes;
    result["resident"] = stats.resident;
    result["moved_in"] = stats.moved_in;
    result["moved_out"] = stats.moved_out;
    result["waited_ns"] = stats.waited_ns;
    return result;
  }

 private:
  [[nodiscard]] std::string prefix() const {
    return "a paged buffer of " + std::to_string(bytes_) + " bytes (" + pager_.name + ")";
  }

  [[noreturn]] void raise_open(const Status& status, int error,
                               const std::optional<std::string>& directory) const {
    const std::string message = prefix() + " cannot be made: " + status.message;
    if (error != 0 && error != ENOMEM && error != EAGAIN && !pager_.on_device) {
      const char* const given = directory ? directory->c_str() : std::getenv("TMPDIR");
      const char* const where = given == nullptr || *given == '\0' ? "/var/tmp" : given;
      PyErr_SetObject(PyExc_OSError, py::make_tuple(error, message, where).ptr());
      throw py::error_already_set();
    }
    raise_status(status, message);
  }

  [[noreturn]] static void raise_status(const Status& status, const std::string& message) {
    if (status.code == StatusCode::out_of_memory) raise(PyExc_MemoryError, message);
    if (status.code == StatusCode::invalid_argument) raise(PyExc_ValueError, message);
    raise(PyExc_RuntimeError, message);
  }

  void check_range(std::int64_t begin, std::int64_t bytes) const {
    if (begin >= 0 && begin % kPagedAlignment == 0 && bytes > 0 && bytes <= bytes_ - begin) return;
    throw py::value_error("begin must be a multiple of " + std::to_string(kPagedAlignment) +
                          " and the range within " + std::to_string(bytes_) + " bytes, got begin " +
                          std::to_string(begin) + ", bytes " + std::to_string(bytes));
  }

  template <class Call>
  void call(const Call& pager_call) const {
    Status status;
    {
      const py::gil_scoped_release unlocked;
      status = pager_call();
    }
    if (!status.ok()) raise_status(status, prefix() + ": " + status.message);
  }

  const Pager& pager_;
  qlora::PagedBuffer* buffer_ = nullptr;
  int device_;
  std::int64_t bytes_;
};

std::optional<std::string> why_not(const std::string& name, int device) {
  const Status status = pager_named(name).supports(device);
  return status.ok() ? std::nullopt : std::optional<std::string>(status.message);
}

std::vector<std::string> pagers() {
  std::vector<std::string> names;
  for (int i = 0; pager(i) != nullptr; ++i) names.emplace_back(pager(i)->name);
  return names;
}

}  // namespace

void define_paged_buffer(py::module_& m) {
  m.def("pagers", &pagers, "The names of the pagers in this build.");
  m.def("why_no_pager", &why_not, py::arg("name"), py::arg("device") = 0,
        "What that pager lacks here to work for this device, or None.");

  py::class_<PagedBytes>(m, "PagedBytes", "Bytes of a PagedBuffer, for torch.from_dlpack.")
      .def_readonly("address", &PagedBytes::address)
      .def("part", &PagedBytes::part, py::arg("begin"), py::arg("bytes"))
      .def(
          "__dlpack__",
          [](const PagedBytes& self, const py::object&, const py::kwargs&) {
            return self.capsule();
          },
          py::arg("stream") = py::none())
      .def("__dlpack_device__",
           [](const PagedBytes& self) { return std::pair(self.device.type, self.device.id); });

  py::class_<PagedBuffer>(m, "PagedBuffer", "Memory that may be elsewhere (paging.h).")
      .def(py::init<const std::string&, std::int64_t, int, const std::optional<std::string>&,
                    std::int64_t, bool>(),
           py::arg("pager"), py::arg("bytes"), py::kw_only(), py::arg("device") = 0,
           py::arg("directory") = py::none(), py::arg("window_bytes") = 0,
           py::arg("oversubscribe") = false)
      .def_property_readonly("pager", &PagedBuffer::name)
      .def_property_readonly("bytes", &PagedBuffer::bytes)
      .def("host_view", &PagedBuffer::host_view)
      .def("prefetch", &PagedBuffer::prefetch, py::arg("begin"), py::arg("bytes"),
           py::arg("stream") = 0)
      .def("acquire", &PagedBuffer::acquire, py::arg("begin"), py::arg("bytes"),
           py::arg("stream") = 0)
      .def("release", &PagedBuffer::release, py::arg("begin"), py::arg("bytes"),
           py::arg("stream") = 0, py::arg("modified") = true)
      .def("evict", &PagedBuffer::evict, py::arg("begin"), py::arg("bytes"), py::arg("stream") = 0)
      .def("settle", &PagedBuffer::settle)
      .def("stats", &PagedBuffer::stats);
}

}  // namespace qlora::python
