// Streams and events, of the current device: what may go on at the same time, and what waits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "device/launch.cuh"
#include "qlora_native/status.h"

namespace qlora::cuda {

// An error is told by the call that has it, and not left for another's.
inline Status called(cudaError_t error) {
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return to_status(error);
}

// Its work is not ordered with the default stream's.
inline Status create_stream(void** stream) {
  cudaStream_t made = nullptr;
  const cudaError_t error = cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking);
  *stream = made;
  return called(error);
}

// What is on it goes on to its end.
inline void destroy_stream(void* stream) {
  static_cast<void>(cudaStreamDestroy(static_cast<cudaStream_t>(stream)));
}

// The host waits for all that was put on the stream; on any.
inline Status synchronize_stream(void* stream) {
  return called(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)));
}
inline Status synchronize_device() { return called(cudaDeviceSynchronize()); }

// Whether what is put there now becomes a graph's, and does not run.
inline Status is_captured(void* stream, bool* captured) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  *captured = status != cudaStreamCaptureStatusNone;
  return called(error);
}

// `timed`: it keeps when it was done, which costs some microseconds.
inline Status create_event(void** event, bool timed) {
  cudaEvent_t made = nullptr;
  const cudaError_t error =
      cudaEventCreateWithFlags(&made, timed ? cudaEventDefault : cudaEventDisableTiming);
  *event = made;
  return called(error);
}

inline void destroy_event(void* event) {
  static_cast<void>(cudaEventDestroy(static_cast<cudaEvent_t>(event)));
}

// From now on the event is that all which the stream has now is done.
inline Status record_event(void* event, void* stream) {
  return called(
      cudaEventRecord(static_cast<cudaEvent_t>(event), static_cast<cudaStream_t>(stream)));
}

// What the stream is given from now on waits for what the event is now. The host does not.
inline Status wait_event(void* stream, void* event) {
  return called(
      cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), static_cast<cudaEvent_t>(event), 0));
}

inline Status is_done(void* event, bool* done) {
  const cudaError_t error = cudaEventQuery(static_cast<cudaEvent_t>(event));
  *done = error == cudaSuccess;
  const Status status = called(error);
  return error == cudaErrorNotReady ? Status{} : status;
}

// Between two timed events that are done.
inline Status elapsed_ns(void* from, void* to, std::int64_t* ns) {
  float milliseconds = 0;
  const cudaError_t error = cudaEventElapsedTime(&milliseconds, static_cast<cudaEvent_t>(from),
                                                 static_cast<cudaEvent_t>(to));
  *ns = static_cast<std::int64_t>(static_cast<double>(milliseconds) * 1e6);
  return called(error);
}

}  // namespace qlora::cuda
