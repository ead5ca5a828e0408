#include "fibre.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {
namespace {

constexpr std::size_t kStackBytes = 256 * 1024;  // of address space; a kernel touches a few kB

}  // namespace

Fibre::~Fibre() {
  if (stack_ != nullptr) munmap(stack_, kStackBytes);
}

void Fibre::allocate() {
  if (stack_ != nullptr) return;
  void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  stack_ = static_cast<char*>(memory);
  mprotect(stack_, static_cast<std::size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE);
}

#if defined(EMULATION_HAND_SWITCH)

// fibre_x86_64.S
extern "C" void emulation_switch(void** save_stack_pointer, void* new_stack_pointer);
extern "C" void emulation_begin();

void Fibre::start(Entry entry, void* argument) {
  allocate();
  auto* top = reinterpret_cast<std::uintptr_t*>(stack_ + kStackBytes);
  top -= 2;  // zeros, which end a debugger's backtrace; 16 bytes keep the stack aligned for a call
  *--top = reinterpret_cast<std::uintptr_t>(&emulation_begin);
  *--top = 0;                                           // rbp
  *--top = reinterpret_cast<std::uintptr_t>(entry);     // rbx
  *--top = reinterpret_cast<std::uintptr_t>(argument);  // r12
  for (int i = 0; i < 3; ++i) *--top = 0;               // r13, r14, r15
  inside_ = top;
}

void Fibre::switch_to() { emulation_switch(&outside_, inside_); }
void Fibre::leave() { emulation_switch(&inside_, outside_); }

#else

void Fibre::run(unsigned low, unsigned high) {
  const std::uintptr_t address = std::uintptr_t{high} << 32 | low;
  Fibre& fibre = *reinterpret_cast<Fibre*>(address);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &fibre.outer_stack_, &fibre.outer_size_);
#endif
  fibre.entry_(fibre.argument_);
}

void Fibre::start(Entry entry, void* argument) {
  allocate();
  entry_ = entry;
  argument_ = argument;
#if defined(__SANITIZE_ADDRESS__)
  // A fibre that was left for good, after a fault, has its frames' red zones still marked.
  __asan_unpoison_memory_region(stack_, kStackBytes);
  fake_stack_ = nullptr;
#endif
  getcontext(&inside_);
  inside_.uc_stack.ss_sp = stack_;
  inside_.uc_stack.ss_size = kStackBytes;
  inside_.uc_link = nullptr;
  const auto address = reinterpret_cast<std::uintptr_t>(this);
  makecontext(&inside_, reinterpret_cast<void (*)()>(&Fibre::run), 2,
              static_cast<unsigned>(address & 0xFFFFFFFFu), static_cast<unsigned>(address >> 32));
}

void Fibre::switch_to() {
#if defined(__SANITIZE_ADDRESS__)
  void* outer_fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&outer_fake_stack, stack_, kStackBytes);
#endif
  swapcontext(&outside_, &inside_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(outer_fake_stack, nullptr, nullptr);
#endif
}

void Fibre::leave() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fake_stack_, outer_stack_, outer_size_);
#endif
  swapcontext(&inside_, &outside_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack_, &outer_stack_, &outer_size_);
#endif
}

#endif

}  // namespace emulation
