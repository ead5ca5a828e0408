// By what to divide a codebook so that its values, rounded to 16 bits, err least: for kernels that
// round these, and scale sums of products afterwards (kernels/linear_few_rows.cuh).
//
// Rounding NF4's values as they are errs by 0.65 (bf16) or 0.77 (fp16) of what it errs to round
// their products with scales of all sizes (root of mean squares over the codes). With the best of
// 1024 factors it is 0.39 or 0.35, at most 0.53 of a unit of roundoff relative to a value. FP4's
// values, but for the smallest multiples of a twelfth, then lose next to nothing.
#pragma once

#include "qlora_native/format.h"
#include "qlora_native/types.h"

namespace qlora::cuda {

template <class T>
double rounding_error(const Format& format, float factor) {  // sum of squares
  double sum = 0.0;
  for (const float value : format.values) {
    const double error =
        static_cast<double>(to_float(from_float<T>(value / factor))) * factor - value;
    sum += error * error;
  }
  return sum;
}

template <class T>
float search_codebook_factor(const Format& format) {
  float best = 1.0f;
  double least = rounding_error<T>(format, best);
  for (int i = 1; i < 1024; ++i) {
    const float factor = 1.0f - static_cast<float>(i) / 2048.0f;  // a binade: 1 down to 1/2
    const double error = rounding_error<T>(format, factor);
    if (error < least) {
      least = error;
      best = factor;
    }
  }
  return best;
}

// Searched once in a process: 16,384 roundings.
template <class T>
float codebook_factor(const Format& format) {
  static const float nf4 = search_codebook_factor<T>(kNf4);
  static const float fp4 = search_codebook_factor<T>(kFp4);
  switch (format.tag) {
    case FormatTag::nf4:
      return nf4;
    case FormatTag::fp4:
      return fp4;
  }
  return 1.0f;
}

}  // namespace qlora::cuda
