// What the two pagers of a GPU do differently: where a range stands in device memory, and how it
// gets there and back. What waits for what is the same for both (device_buffer.h).
#pragma once

#include <cstdint>
#include <vector>

#include "paging/marks.h"
#include "qlora_native/paging.h"
#include "qlora_native/status.h"

namespace qlora::cuda {

class Carrier {
 public:
  Carrier() = default;
  Carrier(const Carrier&) = delete;
  Carrier& operator=(const Carrier&) = delete;
  virtual ~Carrier() = default;  // frees all, with no work on it under way

  // Reserves the host's side of it, all zero.
  virtual Status open(const PagedParams& params) = 0;
  [[nodiscard]] virtual char* host() const = 0;

  // Finds room for a range on the device: where it will stand, and what work there has to wait for.
  // Null: there is none beside what is there, of which `arriving` bytes are on their way.
  virtual Status take(std::int64_t begin, std::int64_t bytes, std::int64_t arriving, char** address,
                      std::vector<Mark>* after) = 0;
  // Gives that room up, behind these marks; or as if it had never been taken, with what it got.
  virtual void give(char* address, std::int64_t bytes, std::vector<Mark> after) = 0;
  virtual void withdraw(char* address, std::int64_t bytes, std::vector<Mark> after) = 0;

  // Moves a range, in the stream's order. `moves`: whether it has to, to be given up.
  virtual Status to_device(std::int64_t begin, std::int64_t bytes, char* address, void* stream) = 0;
  [[nodiscard]] virtual bool moves(bool modified) const = 0;
  virtual Status to_host(std::int64_t begin, std::int64_t bytes, const char* address,
                         void* stream) = 0;

  // Gives device memory back that it keeps while nothing stands there and no work goes on.
  virtual void give_back() = 0;
};

}  // namespace qlora::cuda
