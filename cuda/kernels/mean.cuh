// The mean of the absmax values, in fp64, by one block of threads.
//
// Thread t adds the values t, t + 1024, … in that order; a tree in shared memory adds the 1024
// sums. The order is fixed, so the bits are the same on every card and in every run. It is not the
// CPU backend's order: the two fp64 sums differ by some 1e-15 of their size, so that their fp32
// roundings differ in one case of some 10^7.
//
// Limiter: one multiprocessor's loads, about 100 GB/s: 37 µs for the 917,504 scales of a
// [14336, 4096] weight. It runs when a model is quantized, never while one trains.
#pragma once

#include <cstdint>

#include "device/global.cuh"
#include "device/shared.cuh"
#include "device/thread.cuh"

namespace qlora::cuda {

inline constexpr int kMeanThreads = 1024;

struct MeanArguments {
  std::int64_t n;
  bool is_given;
  Global<const float> x;      // [n]
  Global<const float> given;  // [1], taken in place of the mean where there is one
  Global<float> mean;         // [1] out
};

__global__ void __launch_bounds__(kMeanThreads)
    mean_kernel(const __grid_constant__ MeanArguments p) {
  __shared__ SharedArray<double, kMeanThreads> sums;
  if (p.is_given) {
    if (thread_index() == 0) p.mean.store(0, p.given.load(0));
    return;
  }
  double sum = 0.0;
  for (std::int64_t i = thread_index(); i < p.n; i += kMeanThreads) sum += double{p.x.load(i)};
  sums.store(thread_index(), sum);
  for (int half = kMeanThreads / 2; half > 0; half /= 2) {
    sync_block();
    if (thread_index() < half) {
      sum += sums.load(thread_index() + half);
      sums.store(thread_index(), sum);
    }
  }
  if (thread_index() == 0) {
    p.mean.store(0, p.n == 0 ? 0.0f : static_cast<float>(sum / static_cast<double>(p.n)));
  }
}

}  // namespace qlora::cuda
