// The reverse-diffusion chain over a batch, forward and backward: packing, tiles over threads, row blocks.
//
//   u = W_s s + u_z, u_z = W_z z + b1;  h1 = mish(u + tau_k + W_a a_k);  epsilon = trunk(h1)
//   x0 = clip(p_k a_k + e_k epsilon);  a_{k-1} = A_k a_k + B_k x0 + C_k x0_previous + S_k xi_k
#pragma once

#include <cstddef>
#include <cstdint>

#include "packing.h"
#include "weight_gradients.h"

namespace llmdpd {

struct Schedule {
  int steps;
  const StepCoefficients* table;  // [steps]
  float start, clip;              // clip: infinity where there is none
};

struct Noise {
  const float* given;         // [steps + 1, states * samples, A], or null
  const std::uint64_t* keys;  // [1] or [states]
  bool key_per_state;
};

// A call as torch has it.
struct ChainCall {
  TrunkWeights trunk;
  Matrix W_s, W_a;   // [H, S], [H, A]
  const float* u_z;  // W_z z + b1: [H], or [states, H]
  bool u_z_per_state;
  const float* tau;  // W_t time(k): [steps, H]
  std::ptrdiff_t states;
  int samples;
  const float* state;  // [states, S]
  std::ptrdiff_t state_stride;
  Schedule schedule;
  Noise noise;
};

// Floats of what a forward pass keeps for its backward pass.
std::size_t chain_tape_floats(const ChainCall& call, const TileKernels& kernels);

// actions: [states * samples, A]. A row's result depends on nothing but its own state, u_z and noise. `tape` is null
// where no gradient will be asked for, or where its backward pass is to compute the chain again.
void chain_forward(const ChainCall& call, const TileKernels& kernels, int threads, float* actions, float* tape);

void chain_backward(const ChainCall& call, const TileKernels& kernels, int threads, const float* grad_actions,
                    const float* tape, const GradientTargets& targets);

// Runs a prepared chain, without a tape.
void run_chain(const Chain& chain, const TileKernels& kernels, int threads);

}  // namespace llmdpd
