// Memory that may be elsewhere. A buffer is a range of bytes that a step goes through in its order:
// what is needed next is brought, what is not gives way.
//
//     prefetch(i + 1)     acquire(i)   work on it   release(i)     evict(i - 1)
//
// Rules of a caller. Ranges begin at multiples of kPagedAlignment. One range is named alike in
// every call that is about it, from its prefetch or acquire to its eviction; ranges that are
// present at once do not overlap, and sum up to no more than the window. One thread at a time uses
// a buffer.
#pragma once

#include <cstdint>

#include "qlora_native/export.h"
#include "qlora_native/status.h"

namespace qlora {

inline constexpr std::int64_t kPagedAlignment = 256;  // bytes: what a kernel may ask of an address

struct PagedBuffer {};  // each pager derives its own from it

struct PagedParams {
  std::int64_t bytes = 0;           // > 0
  int device = 0;                   // whose memory the state leaves ("managed", "staged")
  const char* directory = nullptr;  // "file": on a disk; null: what TMPDIR names, or /var/tmp
  // "staged": device memory for ranges that are present at once, each rounded up to
  // kPagedAlignment.
  std::int64_t window_bytes = 0;
  // "managed": may be larger than what the device has free now.
  bool oversubscribe = false;
};

struct PagedStats {
  std::int64_t bytes = 0;      // of the buffer
  std::int64_t resident = 0;   // present now: in the device's memory; "file": in RAM
  std::int64_t moved_in = 0;   // since it was opened
  std::int64_t moved_out = 0;  // likewise
  std::int64_t waited_ns = 0;  // for movements that were not over when something needed them
};

struct Pager {
  const char* name;  // "file", "managed" or "staged"
  bool on_device;    // acquire() gives addresses in a GPU's memory, that kernels alone may follow

  // Whether it works on this device here; if not, the message says what is missing.
  Status (*supports)(int device);

  // A buffer of zeros. Everything that it will ever need is reserved now, but for the window: no
  // room is an error here, and none later. Where the system refused something, errno says what.
  Status (*open)(const PagedParams&, PagedBuffer**);

  // Waits for work and movements that are under way. Null is allowed.
  void (*close)(PagedBuffer*);

  // All `bytes` for the host to read and write, up to date with the work so far; nothing may be
  // acquired. It is one and the same address every time, and holds what it held at this call until
  // the next acquire; what is written there is what later acquires find. (Managed, file: the
  // memory itself. Staged: the pinned memory, with whatever lay in the window brought back.)
  Status (*host_view)(PagedBuffer*, void** address);

  // `stream` is a cudaStream_t, or unused ("file"): the one on which the step's kernels run.

  // Begins to bring a range; a hint, that neither waits nor disturbs what is present.
  Status (*prefetch)(PagedBuffer*, std::int64_t begin, std::int64_t bytes, void* stream);

  // Where work that `stream` gets from now on may read and write the range, until its release.
  // A range that was not prefetched is brought now.
  Status (*acquire)(PagedBuffer*, std::int64_t begin, std::int64_t bytes, void* stream,
                    void** address);

  // The work on the range has been given to `stream`; it stays present.
  Status (*release)(PagedBuffer*, std::int64_t begin, std::int64_t bytes, void* stream,
                    bool modified);

  // Lets a released range go behind the work that `stream` has now; neither waits for it nor for
  // the movement. Ranges that are not present are passed over.
  Status (*evict)(PagedBuffer*, std::int64_t begin, std::int64_t bytes, void* stream);

  // Waits until everything evicted has left, and gives the memory back that it stood in, the
  // window's too: the answer to an allocation that failed. Later acquires take it again.
  Status (*settle)(PagedBuffer*);

  Status (*stats)(PagedBuffer*, PagedStats*);
};

// The pager of that name, or null. "file" is always there; a build with CUDA adds its own.
QLORA_EXPORT const Pager* find_pager(const char* name);
// The i-th, or null past the last.
QLORA_EXPORT const Pager* pager(int i);
// Adds one, in place of what has its name; the table must stay valid. Not while any is in use.
QLORA_EXPORT void add_pager(const Pager&);

}  // namespace qlora
