#include <algorithm>
#include <iterator>
#include <utility>

#include "paging/window.h"

namespace qlora::cuda {

void Window::reset(std::int64_t bytes) {
  free_.clear();
  if (bytes > 0) free_.emplace(0, Piece{bytes, 0, {}});
}

std::optional<std::uint64_t> Window::given_at(Pieces::const_iterator first,
                                              std::int64_t bytes) const {
  std::uint64_t latest = 0;
  std::int64_t end = first->first;
  for (auto at = first; at != free_.end() && at->first == end; ++at) {
    latest = std::max(latest, at->second.given);
    end += at->second.bytes;
    if (end - first->first >= bytes) return latest;
  }
  return {};
}

std::optional<std::int64_t> Window::take(std::int64_t bytes, std::vector<Mark>* after) {
  std::optional<std::uint64_t> best;
  auto place = free_.end();
  for (auto at = free_.begin(); at != free_.end(); ++at) {
    const auto given = given_at(at, bytes);
    if (!given || (best && *given >= *best)) continue;
    best = given;
    place = at;
  }
  if (place == free_.end()) return {};
  const std::int64_t offset = place->first;
  for (std::int64_t left = bytes; left > 0; place = free_.erase(place)) {
    Piece& piece = place->second;
    after->insert(after->end(), piece.after.begin(), piece.after.end());
    if (piece.bytes > left) {  // the rest of it stays free
      free_.emplace(place->first + left, Piece{piece.bytes - left, piece.given, piece.after});
    }
    left -= std::min(left, piece.bytes);
  }
  return offset;
}

void Window::give(std::int64_t offset, std::int64_t bytes, std::vector<Mark> after) {
  free_.emplace(offset, Piece{bytes, ++given_, std::move(after)});
}

}  // namespace qlora::cuda
