#include "copies.h"

#include <algorithm>
#include <cstring>

namespace emulation {

void AsyncCopies::start(const SharedBytes& to, const void* source,
                        const std::source_location& where) {
  note_start(to, running_thread(), where);
  std::memset(to.bytes, kPoison, static_cast<std::size_t>(to.size));
  Copy copy{to, {}, groups_};
  std::memcpy(copy.bytes.data(), source, static_cast<std::size_t>(to.size));
  under_way_.push_back(copy);
}

void AsyncCopies::wait(int pending) {
  const auto still = std::find_if(under_way_.begin(), under_way_.end(), [&](const Copy& copy) {
    return copy.group >= groups_ - pending;
  });
  std::for_each(under_way_.begin(), still, [](const Copy& copy) {
    std::memcpy(copy.to.bytes, copy.bytes.data(), static_cast<std::size_t>(copy.to.size));
    note_arrival(copy.to, running_thread().now);
  });
  under_way_.erase(under_way_.begin(), still);
}

}  // namespace emulation
