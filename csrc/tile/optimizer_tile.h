// One step of AdamW (Loshchilov and Hutter 2019), and averages of weights, on a stretch of numbers.
#pragma once

#include "layer_math.h"

namespace {

using llmdpd::AdamW;

double sum_of_squares(const float* from, std::ptrdiff_t count) {
  constexpr int kParts = 4;
  Vec sums[kParts] = {};
  std::ptrdiff_t i = 0;
  for (; i + kParts * kWidth <= count; i += kParts * kWidth) {
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
      const Vec x = load(from + i + part * kWidth);
      sums[part] = fma(x, x, sums[part]);
    }
  }
  double sum = static_cast<double>(sum_of((sums[0] + sums[1]) + (sums[2] + sums[3])));
  for (; i < count; ++i) sum += static_cast<double>(from[i]) * from[i];
  return sum;
}

// The arrays are not each other's, which lets the compiler take whole vectors.
void adamw(const AdamW& step, std::ptrdiff_t count, const float* __restrict gradient, float* __restrict mean,
           float* __restrict square, float* __restrict weight) {
  const float keep = 1.0f - step.rate * step.decay, rate = step.rate / step.mean_share, scale = step.scale;
  const float new_mean = 1.0f - step.beta1, new_square = 1.0f - step.beta2, old_square = step.beta2;
  const float root = 1.0f / __builtin_sqrtf(step.square_share), epsilon = step.epsilon;
  for (std::ptrdiff_t i = 0; i < count; ++i) {
    const float g = gradient[i] * scale;
    const float m = mean[i] + new_mean * (g - mean[i]), v = old_square * square[i] + new_square * (g * g);
    mean[i] = m;
    square[i] = v;
    weight[i] = keep * weight[i] - rate * (m / (__builtin_sqrtf(v) * root + epsilon));
  }
}

void average(float rate, std::ptrdiff_t count, const float* __restrict from, float* __restrict to) {
  if (rate < 0.5f) {
    for (std::ptrdiff_t i = 0; i < count; ++i) to[i] += rate * (from[i] - to[i]);
  } else {  // from the other end: at 1 it is a copy, to the bit
    for (std::ptrdiff_t i = 0; i < count; ++i) to[i] = from[i] - (1.0f - rate) * (from[i] - to[i]);
  }
}

void add(std::ptrdiff_t count, const float* __restrict from, float* __restrict to) {
  for (std::ptrdiff_t i = 0; i < count; ++i) to[i] += from[i];
}

}  // namespace
