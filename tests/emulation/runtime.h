// The emulated CUDA runtime: what the twins of cuda/device/stream.cuh and memory.cuh call.
//
// A call that no runtime takes, work on bytes that nothing orders behind what brings or takes them,
// and a kernel's page fault are faults: the call or the launch answers with a Status, and the text
// is kept (take_faults) for who does not look at it. One host thread at a time.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "allocations.h"
#include "fault.h"
#include "qlora_native/status.h"
#include "streams.h"

namespace emulation {

// What a test can make fail.
enum class Call { any, allocation, copy };  // copies and prefetches

class Runtime {
 public:
  static Runtime& instance();

  // ---- asked by tests ----
  Streams& streams() { return streams_; }
  // The n-th such call from now on answers with an error, and only that one; 0: none.
  void fail(Call which, int n);
  void set_concurrent_managed_access(bool has) { concurrent_managed_access_ = has; }
  // As if a graph were captured on every stream.
  void set_captured(bool captured) { captured_ = captured; }
  void set_device_bytes(std::int64_t bytes) { device_bytes_ = bytes; }
  std::vector<std::string> take_faults();
  // Allocations, streams and events that nobody freed.
  [[nodiscard]] std::int64_t alive() const;

  // ---- the words ----
  qlora::Status create_stream(void** stream);
  void destroy_stream(void* stream);
  qlora::Status synchronize_stream(void* stream);
  qlora::Status synchronize_device();
  qlora::Status is_captured(void* stream, bool* captured);
  qlora::Status create_event(void** event, bool timed);
  void destroy_event(void* event);
  qlora::Status record(void* event, void* stream);
  qlora::Status wait(void* stream, void* event);
  qlora::Status is_done(void* event, bool* done);
  qlora::Status elapsed_ns(void* from, void* to, std::int64_t* ns);

  qlora::Status allocate(MemoryKind kind, std::int64_t bytes, void** memory);
  void free(void* memory);
  qlora::Status device_memory(std::int64_t* free, std::int64_t* total);
  qlora::Status advise(void* memory, std::int64_t bytes);
  qlora::Status prefetch(void* memory, std::int64_t bytes, bool to_device, void* stream);
  qlora::Status copy(void* to, const void* from, std::int64_t bytes, bool to_device, void* stream);
  qlora::Status host_uses(void* memory, std::int64_t bytes);
  [[nodiscard]] bool concurrent_managed_access() const { return concurrent_managed_access_; }

  // Around a launch: what it waits for is done, and what it touched is checked.
  std::optional<Fault> begin_kernel(void* stream);
  std::optional<Fault> end_kernel();

 private:
  // ok, or the error that a test asked for.
  qlora::Status called(Call which);
  qlora::Status refuse(Fault fault);
  qlora::Status misuse(const std::string& what);
  Work next_work(const char* what, Stream* stream);
  Event* find_event(void* event);

  Streams streams_;
  std::set<Event*> events_;
  std::vector<std::string> faults_;
  std::uint64_t works_ = 0;
  Call failing_ = Call::any;
  int fail_in_ = 0;
  bool concurrent_managed_access_ = true;
  bool captured_ = false;
  std::int64_t device_bytes_ = std::int64_t{1} << 30;
  Stream* kernel_stream_ = nullptr;
};

}  // namespace emulation
