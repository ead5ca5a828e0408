// A fibre: a stack and a place to go on from. What a CUDA thread runs on in the emulator.
//
// A switch saves the registers that the System V ABI lets a callee keep, and changes stacks: some
// ten instructions on x86-64 (fibre_x86_64.S). Elsewhere, and under AddressSanitizer, ucontext does
// it, at two system calls a switch. A guard page below each stack catches a kernel that needs more.
#pragma once

#include <cstddef>

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define EMULATION_HAND_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace emulation {

class Fibre {
 public:
  using Entry = void (*)(void* argument);

  Fibre() = default;
  ~Fibre();
  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;

  // Makes the next switch_to() run entry(argument) from its start, on this fibre's stack. `entry`
  // must not return; it ends by leave().
  void start(Entry entry, void* argument);
  // From the scheduler into the fibre, until it leaves.
  void switch_to();
  // From the running fibre back to the scheduler.
  void leave();

 private:
  void allocate();

  char* stack_ = nullptr;
#if defined(EMULATION_HAND_SWITCH)
  void* inside_ = nullptr;  // stack pointers
  void* outside_ = nullptr;
#else
  static void run(unsigned low, unsigned high);
  Entry entry_ = nullptr;
  void* argument_ = nullptr;
  ucontext_t inside_{};
  ucontext_t outside_{};
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack_ = nullptr;
  const void* outer_stack_ = nullptr;
  std::size_t outer_size_ = 0;
#endif
#endif
};

}  // namespace emulation
