#include "runtime.h"

#include <cstring>
#include <new>
#include <utility>

namespace emulation {
namespace {

using qlora::Status;
using qlora::StatusCode;

constexpr Status kAsked{StatusCode::device, "the test made this call fail"};

}  // namespace

Runtime& Runtime::instance() {
  static Runtime runtime;
  return runtime;
}

void Runtime::fail(Call which, int n) {
  failing_ = which;
  fail_in_ = n;
}

std::vector<std::string> Runtime::take_faults() { return std::exchange(faults_, {}); }

std::int64_t Runtime::alive() const {
  return allocations().size() + streams_.alive() + static_cast<std::int64_t>(events_.size());
}

Status Runtime::called(Call which) {
  streams_.move_on();
  if (fail_in_ == 0 || (failing_ != Call::any && failing_ != which) || --fail_in_ > 0) return {};
  return kAsked;
}

Status Runtime::refuse(Fault fault) {
  faults_.push_back(std::move(fault.text));
  static thread_local std::string text;  // until the next one
  text = faults_.back();
  return {StatusCode::device, text.c_str()};
}

Status Runtime::misuse(const std::string& what) {
  return refuse({FaultKind::misuse, std::string(name_of(FaultKind::misuse)) + ": " + what});
}

Work Runtime::next_work(const char* what, Stream* stream) {
  return {what, ++works_, stream != nullptr ? streams_.step(stream) : streams_.host_step()};
}

Event* Runtime::find_event(void* event) {
  const auto at = events_.find(static_cast<Event*>(event));
  return at == events_.end() ? nullptr : *at;
}

// ---- streams and events ----

Status Runtime::create_stream(void** stream) {
  if (const Status status = called(Call::any); !status.ok()) return status;
  *stream = streams_.create();
  return {};
}

void Runtime::destroy_stream(void* stream) {
  Stream* known = streams_.find(stream);
  if (stream == nullptr || known == nullptr) {
    static_cast<void>(misuse("no such stream is destroyed"));
  } else {
    streams_.destroy(known);
  }
}

Status Runtime::synchronize_stream(void* stream) {
  if (const Status status = called(Call::any); !status.ok()) return status;
  Stream* known = streams_.find(stream);
  if (known == nullptr) return misuse("no such stream is waited for");
  streams_.finish(known);
  streams_.learn_all(known);
  return {};
}

Status Runtime::synchronize_device() {
  if (const Status status = called(Call::any); !status.ok()) return status;
  streams_.synchronize();
  return {};
}

Status Runtime::is_captured(void* stream, bool* captured) {
  if (const Status status = called(Call::any); !status.ok()) return status;
  if (streams_.find(stream) == nullptr) return misuse("no such stream");
  *captured = captured_;
  return {};
}

Status Runtime::create_event(void** event, bool timed) {
  if (const Status status = called(Call::any); !status.ok()) return status;
  *event = *events_.insert(new Event{timed, nullptr}).first;
  return {};
}

void Runtime::destroy_event(void* event) {
  Event* known = find_event(event);
  if (known == nullptr) {
    static_cast<void>(misuse("no such event is destroyed"));
    return;
  }
  events_.erase(known);
  delete known;
}

Status Runtime::record(void* event, void* stream) {
  if (const Status status = called(Call::any); !status.ok()) return status;
  Event* known = find_event(event);
  Stream* on = streams_.find(stream);
  if (known == nullptr || on == nullptr) return misuse("no such event or stream");
  streams_.record(*known, on);
  streams_.move_on();
  return {};
}

Status Runtime::wait(void* stream, void* event) {
  if (const Status status = called(Call::any); !status.ok()) return status;
  const Event* known = find_event(event);
  Stream* on = streams_.find(stream);
  if (known == nullptr || on == nullptr) return misuse("no such event or stream");
  streams_.wait(on, *known);
  return {};
}

Status Runtime::is_done(void* event, bool* done) {
  if (const Status status = called(Call::any); !status.ok()) return status;
  const Event* known = find_event(event);
  if (known == nullptr) return misuse("no such event");
  *done = Streams::is_done(*known);
  if (*done) streams_.learn(*known);
  return {};
}

Status Runtime::elapsed_ns(void* from, void* to, std::int64_t* ns) {
  if (const Status status = called(Call::any); !status.ok()) return status;
  const Event* first = find_event(from);
  const Event* second = find_event(to);
  if (first == nullptr || second == nullptr) return misuse("no such event");
  if (first->record == nullptr || second->record == nullptr || !first->timed || !second->timed) {
    return misuse("the time between events that were not recorded, or keep none");
  }
  if (!Streams::is_done(*first) || !Streams::is_done(*second)) {
    return misuse("the time between events that are not done");
  }
  *ns = second->record->clock - first->record->clock;
  return {};
}

// ---- memory ----

Status Runtime::allocate(MemoryKind kind, std::int64_t bytes, void** memory) {
  *memory = nullptr;
  if (!called(Call::allocation).ok()) return {StatusCode::out_of_memory, kAsked.message};
  if (kind == MemoryKind::device && allocations().bytes_on_device() + bytes > device_bytes_) {
    return {StatusCode::out_of_memory, "out of memory"};
  }
  *memory = allocations().add(kind, bytes);
  return {};
}

void Runtime::free(void* memory) {
  if (memory == nullptr) return;
  streams_.move_on();
  Allocation* known = allocations().find(memory);
  if (known == nullptr || known->data() != memory) {
    static_cast<void>(misuse("no such memory is freed"));
    return;
  }
  auto fault = known->use(reinterpret_cast<std::uintptr_t>(memory), known->bytes(), true,
                          next_work("free", nullptr), streams_.host());
  if (fault) static_cast<void>(refuse(std::move(*fault)));
  streams_.synchronize();  // as the runtime does
  allocations().remove(memory);
}

Status Runtime::device_memory(std::int64_t* free, std::int64_t* total) {
  if (const Status status = called(Call::any); !status.ok()) return status;
  *total = device_bytes_;
  *free = device_bytes_ - allocations().bytes_on_device();
  return {};
}

Status Runtime::advise(void* memory, std::int64_t bytes) {
  if (const Status status = called(Call::any); !status.ok()) return status;
  const Allocation* known = allocations().find(memory, bytes);
  if (known == nullptr || known->kind() != MemoryKind::managed) {
    return misuse("advice on what is not managed memory");
  }
  if (!concurrent_managed_access_) return {StatusCode::device, "invalid device ordinal"};
  return {};
}

Status Runtime::prefetch(void* memory, std::int64_t bytes, bool to_device, void* stream) {
  if (const Status status = called(Call::copy); !status.ok()) return status;
  Allocation* known = allocations().find(memory, bytes);
  Stream* on = streams_.find(stream);
  if (known == nullptr || known->kind() != MemoryKind::managed || on == nullptr) {
    return misuse("a prefetch of what is not managed memory, or on no stream");
  }
  if (!concurrent_managed_access_) return {StatusCode::device, "invalid device ordinal"};
  const auto address = reinterpret_cast<std::uintptr_t>(memory);
  const Work work = next_work(to_device ? "prefetch to the device" : "prefetch to the host", on);
  if (auto fault = known->use(address, bytes, true, work, on->past)) {
    return refuse(std::move(*fault));
  }
  streams_.put(on, [this, known, address, bytes, to_device] {
    streams_.spend(known->move(address, bytes, to_device));
    if (allocations().bytes_on_device() > device_bytes_) {
      static_cast<void>(misuse("a prefetch of more memory than the device has free"));
    }
  });
  streams_.move_on();
  return {};
}

Status Runtime::copy(void* to, const void* from, std::int64_t bytes, bool to_device, void* stream) {
  if (const Status status = called(Call::copy); !status.ok()) return status;
  Allocation* target = allocations().find(to, bytes);
  Allocation* source = allocations().find(from, bytes);
  Stream* on = streams_.find(stream);
  if (target == nullptr || source == nullptr || on == nullptr ||
      target->kind() != (to_device ? MemoryKind::device : MemoryKind::pinned) ||
      source->kind() != (to_device ? MemoryKind::pinned : MemoryKind::device)) {
    return misuse("a copy that is not between pinned and device memory, within either");
  }
  const Work work = next_work(to_device ? "copy to the device" : "copy to the host", on);
  auto fault = source->use(reinterpret_cast<std::uintptr_t>(from), bytes, false, work, on->past);
  if (!fault) {
    fault = target->use(reinterpret_cast<std::uintptr_t>(to), bytes, true, work, on->past);
  }
  if (fault) return refuse(std::move(*fault));
  streams_.put(on, [this, to, from, bytes] {
    std::memcpy(to, from, static_cast<std::size_t>(bytes));
    streams_.spend(bytes);
  });
  streams_.move_on();
  return {};
}

Status Runtime::host_uses(void* memory, std::int64_t bytes) {
  streams_.move_on();
  Allocation* known = allocations().find(memory, bytes);
  if (known == nullptr || known->kind() == MemoryKind::device) {
    return misuse("the host touches what is not its memory");
  }
  const auto address = reinterpret_cast<std::uintptr_t>(memory);
  auto fault = known->use(address, bytes, true, next_work("the program", nullptr), streams_.host());
  if (fault) return refuse(std::move(*fault));
  if (known->kind() == MemoryKind::managed) known->move(address, bytes, false);
  return {};
}

// ---- kernels ----

std::optional<Fault> Runtime::begin_kernel(void* stream) {
  kernel_stream_ = streams_.find(stream);
  if (kernel_stream_ == nullptr) {
    return Fault{FaultKind::misuse, "runtime misuse: a launch on no stream"};
  }
  streams_.move_on();
  streams_.finish(kernel_stream_);
  return {};
}

std::optional<Fault> Runtime::end_kernel() {
  const Work kernel = next_work("a kernel", kernel_stream_);
  auto fault = allocations().end_kernel(kernel, kernel_stream_->past);
  if (fault) faults_.push_back(fault->text);
  return fault;
}

}  // namespace emulation
