// Twin of cuda/device/stream.cuh: the emulated runtime's streams and events.
#pragma once

#include <cstdint>

#include "device/launch.cuh"
#include "qlora_native/status.h"
#include "runtime.h"

namespace qlora::cuda {

inline emulation::Runtime& runtime() { return emulation::Runtime::instance(); }

inline Status create_stream(void** stream) { return runtime().create_stream(stream); }
inline void destroy_stream(void* stream) { runtime().destroy_stream(stream); }
inline Status synchronize_stream(void* stream) { return runtime().synchronize_stream(stream); }
inline Status synchronize_device() { return runtime().synchronize_device(); }

inline Status is_captured(void* stream, bool* captured) {
  return runtime().is_captured(stream, captured);
}

inline Status create_event(void** event, bool timed) {
  return runtime().create_event(event, timed);
}
inline void destroy_event(void* event) { runtime().destroy_event(event); }
inline Status record_event(void* event, void* stream) { return runtime().record(event, stream); }
inline Status wait_event(void* stream, void* event) { return runtime().wait(stream, event); }
inline Status is_done(void* event, bool* done) { return runtime().is_done(event, done); }

inline Status elapsed_ns(void* from, void* to, std::int64_t* ns) {
  return runtime().elapsed_ns(from, to, ns);
}

}  // namespace qlora::cuda
