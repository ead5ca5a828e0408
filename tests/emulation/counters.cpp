#include "counters.h"

#include <algorithm>
#include <set>

#include "machine.h"

namespace emulation {
namespace {

constexpr std::uintptr_t kSectorBytes = 32;
constexpr std::uintptr_t kBankBytes = 4;
constexpr std::uintptr_t kBanks = 32;

}  // namespace

Counters& counters() {
  static Counters counters;
  return counters;
}

void Counters::note(Kind kind, std::uintptr_t address, int bytes,
                    const std::source_location& where) {
  const int thread = Machine::instance().thread().index;
  const Place place{where.file_name(), where.line(), where.column(), kind};
  const std::uint32_t time = times_[{thread, place}]++;
  instructions_[{thread / kWarpSize, place, time}].push_back({address, bytes, thread % kWarpSize});
}

void Counters::end_block() {
  for (const auto& [instruction, lanes] : instructions_) {
    add(std::get<Kind>(std::get<Place>(instruction)), lanes);
  }
  instructions_.clear();
  times_.clear();
}

void Counters::add(Kind kind, const std::vector<Access>& lanes) {
  if (kind == Kind::shared) {
    ++counts_.shared_instructions;
    // 4 bytes a lane: all 32 lanes at a time; 8: half of them; 16: a quarter.
    const int widest = std::max_element(lanes.begin(), lanes.end(), [](auto& a, auto& b) {
                         return a.bytes < b.bytes;
                       })->bytes;
    const int at_a_time = widest <= 4 ? kWarpSize : widest == 8 ? kWarpSize / 2 : kWarpSize / 4;
    for (int first = 0; first < kWarpSize; first += at_a_time) {
      std::set<std::uintptr_t> words;
      for (const Access& access : lanes) {
        if (access.lane < first || access.lane >= first + at_a_time) continue;
        const auto end = access.address + static_cast<std::uintptr_t>(access.bytes);
        for (auto word = access.address / kBankBytes; word * kBankBytes < end; ++word) {
          words.insert(word);
        }
      }
      int in_bank[kBanks] = {};
      int passes = 0;
      for (const std::uintptr_t word : words) passes = std::max(passes, ++in_bank[word % kBanks]);
      counts_.shared_passes += passes;
      counts_.bank_conflicts += std::max(passes - 1, 0);
    }
    return;
  }
  std::set<std::uintptr_t> sectors;
  std::int64_t bytes = 0;
  for (const Access& access : lanes) {
    bytes += access.bytes;
    const auto last = access.address + static_cast<std::uintptr_t>(access.bytes) - 1;
    for (auto s = access.address / kSectorBytes; s <= last / kSectorBytes; ++s) sectors.insert(s);
  }
  ++counts_.global_instructions;
  const auto count = static_cast<std::int64_t>(sectors.size());
  if (kind == Kind::load) {
    counts_.loaded_bytes += bytes;
    counts_.loaded_sectors += count;
  } else {
    counts_.stored_bytes += bytes;
    counts_.stored_sectors += count;
  }
}

}  // namespace emulation
