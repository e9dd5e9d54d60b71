// Steps of an optimiser and averages of weights, over all tensors of a network at once.
#pragma once

#include <cstddef>
#include <vector>

#include "tile/layer_kernels.h"

namespace llmdpd {

// One tensor's numbers, as the call needs them; null for those that it doesn't.
struct Numbers {
  std::ptrdiff_t count;
  const float* from;  // gradients, or the weights that are averaged
  float *mean, *square, *to;
  float* average = nullptr;  // of the weights, moved after their step
};

// In one order whatever the number of threads.
double sum_of_squares(const std::vector<Numbers>& tensors, const LayerKernels& kernels, int threads);
// rate: of the averages, where tensors have any; they take the stepped weights while these are in the cache.
void adamw(const AdamW& step, const std::vector<Numbers>& tensors, const LayerKernels& kernels, int threads,
           float rate = 0.0f);
void average(float rate, const std::vector<Numbers>& tensors, const LayerKernels& kernels, int threads);

// Adds to the tensors' `to`, which lie one after the other in each of the rows, what is in these; the squares' sum then.
double add_up(const std::vector<Numbers>& tensors, const std::vector<const float*>& rows, const LayerKernels& kernels,
              int threads);

}  // namespace llmdpd
