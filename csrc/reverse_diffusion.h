// The forward reverse-diffusion chain over a batch: packing, what is shared by all rows, and tiles over threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "mlp_tile.h"

namespace llmdpd {

// Weights as in torch: [outputs, inputs], row-major. The first layer's inputs are [a_k, time, state, prompt].
struct Net {
  int action_dim, time_dim, state_dim, prompt_dim, hidden_dim;
  const float *weight[4], *bias[4];
};

struct Chain {
  int steps;
  const float* time_embedding;    // [steps, T]
  const StepCoefficients* table;  // [steps]
  float start, clip;              // clip: infinity where there is none
};

struct Batch {
  std::ptrdiff_t states;
  int samples;
  const float* state;   // [states, S]
  const float* prompt;  // [Z] or [states, Z]
  bool prompt_per_state;
  const float* noise;         // [steps + 1, states * samples, A], or null
  const std::uint64_t* keys;  // [1] or [states]
  bool key_per_state;
};

// actions: [states * samples, A]. A row's result depends on nothing but its own state, prompt and noise.
void reverse_diffusion(const Net& net, const Chain& chain, const Batch& batch, const TileKernels& kernels, int threads,
                       float* actions);

}  // namespace llmdpd
