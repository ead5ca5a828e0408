// What the emulator finds wrong with a kernel, or with calls of the runtime.
#pragma once

#include <source_location>
#include <string>

namespace emulation {

enum class FaultKind {
  out_of_bounds,  // outside the buffer that the launch declared
  misaligned,     // a vector access off its own size
  uninitialised,  // shared memory read before it was written, in this block of threads
  race,           // shared memory, two threads, no barrier between, one of them writes
  global_race,    // global memory: the same, and between blocks nothing published
  in_flight,      // what an asynchronous copy will write, touched before the wait that covers it
  barrier,        // threads wait at different barriers, or some never come
  warp,           // lanes wait in different exchanges, or some never come
  configuration,  // a launch that no GPU would take
  unordered,      // bytes used by the work of two streams, or the host, that no event orders
  page_fault,     // managed memory that is not on the device, touched by a kernel
  misuse,         // a call that no runtime would take
};

const char* name_of(FaultKind kind);

struct Fault {
  FaultKind kind;
  std::string text;  // where, which thread, what
};

// Thrown in the fibre of the thread that is at fault; ends the launch.
[[noreturn]] void fault(FaultKind kind, const std::source_location& where, const std::string& what);

}  // namespace emulation
