// A 4-bit weight for the programs that run kernels on the emulator (run_*.cpp).
#pragma once

#include "qlora_native/layout.h"
#include "qlora_native/params.h"
#include "run_buffers.h"

namespace emulated_run {

inline Buffer bytes(std::int64_t n) {
  Buffer buffer(n, 1, 0);
  for (std::int64_t i = 0; i < n; ++i) {
    buffer.as<std::uint8_t>()[i] = static_cast<std::uint8_t>(i * 2654435761u >> 13);
  }
  return buffer;
}

class RunWeight {
 public:
  RunWeight(std::int64_t rows, std::int64_t cols, std::int64_t blocksize, bool double_quantized)
      : rows_(rows),
        cols_(cols),
        blocksize_(blocksize),
        double_quantized_(double_quantized),
        packed_(bytes(packed_bytes(rows * cols))),
        codes_(bytes(n_blocks(rows * cols, blocksize))),
        absmax_(values(n_blocks(rows * cols, blocksize), DType::float32, 0)),
        offset_(values(1, DType::float32, 0)) {}

  [[nodiscard]] Weight4bit weight() const {
    const Scales plain{.absmax = absmax_.as<float>()};
    const Scales doubled{.absmax_q8 = codes_.as<std::uint8_t>(),
                         .nested_absmax = absmax_.as<float>(),
                         .nested_offset = offset_.as<float>()};
    return {.format = kNf4,
            .rows = rows_,
            .cols = cols_,
            .blocksize = blocksize_,
            .packed = packed_.as<std::uint8_t>(),
            .scales = double_quantized_ ? doubled : plain};
  }

 private:
  std::int64_t rows_, cols_, blocksize_;
  bool double_quantized_;
  Buffer packed_, codes_, absmax_, offset_;
};

}  // namespace emulated_run
