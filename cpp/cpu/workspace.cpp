#include "workspace.h"

#include <cstdlib>

namespace qlora::cpu {
namespace {

constexpr std::size_t kPage = 4096;
constexpr int kSlots = 2;  // an op's own scratch, and that of a product inside it

void* allocate(std::size_t bytes) { return std::aligned_alloc(kPage, bytes); }

struct Buffer {
  void* data = nullptr;
  std::size_t bytes = 0;
  bool leased = false;

  ~Buffer() { std::free(data); }
};

thread_local Buffer buffers[kSlots];

}  // namespace

Workspace::Workspace(std::size_t bytes) {
  const std::size_t rounded = (bytes + kPage) / kPage * kPage;  // at least one page
  while (slot_ < kSlots && buffers[slot_].leased) ++slot_;
  if (slot_ == kSlots || rounded > kKeptBytes) {
    slot_ = kNoSlot;
    data_ = allocate(rounded);
    return;
  }
  Buffer& buffer = buffers[slot_];
  if (rounded > buffer.bytes) {
    std::free(buffer.data);
    buffer.data = allocate(rounded);
    buffer.bytes = buffer.data == nullptr ? 0 : rounded;
  }
  data_ = buffer.data;
  buffer.leased = true;
}

Workspace::~Workspace() {
  if (slot_ == kNoSlot) {
    std::free(data_);
  } else {
    buffers[slot_].leased = false;
  }
}

}  // namespace qlora::cpu
