// The two streams of a device on which memory moves, beside the step's: one for each direction,
// since a link carries both at once.
#pragma once

#include <memory>

#include "qlora_native/status.h"

namespace qlora::cuda {

struct SideStreams {
  void* incoming = nullptr;
  void* outgoing = nullptr;

  SideStreams() = default;
  SideStreams(const SideStreams&) = delete;
  SideStreams& operator=(const SideStreams&) = delete;
  ~SideStreams();

  // Those of the current device, whose number it is: made for the first who asks, gone with the
  // last who has them.
  static Status of(int device, std::shared_ptr<SideStreams>* streams);
};

}  // namespace qlora::cuda
