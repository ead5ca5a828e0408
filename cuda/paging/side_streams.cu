#include <map>
#include <mutex>

#include "device/stream.cuh"
#include "paging/side_streams.h"

namespace qlora::cuda {

SideStreams::~SideStreams() {
  if (incoming != nullptr) destroy_stream(incoming);
  if (outgoing != nullptr) destroy_stream(outgoing);
}

Status SideStreams::of(int device, std::shared_ptr<SideStreams>* streams) {
  static std::mutex one_at_a_time;
  static std::map<int, std::weak_ptr<SideStreams>> made;
  const std::lock_guard lock(one_at_a_time);
  *streams = made[device].lock();
  if (*streams != nullptr) return {};
  auto fresh = std::make_shared<SideStreams>();
  if (const Status status = create_stream(&fresh->incoming); !status.ok()) return status;
  if (const Status status = create_stream(&fresh->outgoing); !status.ok()) return status;
  made[device] = fresh;
  *streams = std::move(fresh);
  return {};
}

}  // namespace qlora::cuda
