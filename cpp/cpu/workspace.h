// Scratch memory of one call: leased from a buffer that the calling thread keeps for its next call.
//
// A fresh megabyte costs some 250 page faults, as much as a small product itself; so each thread
// keeps what its calls needed, up to kKeptBytes a lease. Everything a call needs, for all the
// threads it will use, is leased before anything is computed: a failure is known while no output is
// written yet. Defined out of line, in a file without an instruction set's flags: an inline
// function of this class would be compiled differently by each isa_*.cpp, and the linker would keep
// any one of them.
#pragma once

#include <cstddef>

#include "qlora_native/status.h"

namespace qlora::cpu {

inline constexpr Status kOutOfMemory = {StatusCode::out_of_memory,
                                        "no memory for the scratch space of a matrix product"};

class Workspace {
 public:
  static constexpr std::size_t kKeptBytes = std::size_t{64} << 20;

  explicit Workspace(std::size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // Aligned to a page; null where memory is short.
  template <class T>
  [[nodiscard, gnu::always_inline]] T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  static constexpr int kNoSlot = -1;

  void* data_ = nullptr;
  int slot_ = 0;  // which of the thread's buffers; kNoSlot: none, its own
};

}  // namespace qlora::cpu
