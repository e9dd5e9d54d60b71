// The three-layer Mish net over a batch, forward and backward: a critic, or the noise network in the diffusion loss.
#pragma once

#include <cstddef>
#include <vector>

#include "packing.h"
#include "weight_gradients.h"

namespace llmdpd {

// A call as torch has it: out = trunk(W1 x + init).
struct MlpCall {
  TrunkWeights trunk;
  Matrix input_weight;  // W1 [H, inputs]
  const float* init;    // [H], or [rows / init_share, H]
  bool init_per_row;
  std::ptrdiff_t rows;
  const float* x;  // [rows, inputs]
  std::ptrdiff_t x_stride;
  int init_share = 1;  // rows that share a row of init, where it has several
};

std::size_t mlp_tape_floats(const MlpCall& call, const TileKernels& kernels);

// out: [rows, outputs]; `tape` as for the chain.
void mlp_forward(const MlpCall& call, const TileKernels& kernels, int threads, float* out, float* tape);
void mlp_backward(const MlpCall& call, const TileKernels& kernels, int threads, const float* grad_out,
                  const float* tape, const GradientTargets& targets);

// The same of several nets of the same sizes on as many rows, whose tiles are shared out among the threads together;
// tapes are kept of all or of none (null).
void mlps_forward(const std::vector<MlpCall>& calls, const TileKernels& kernels, int threads, float* const* outs,
                  float* const* tapes);
void mlps_backward(const std::vector<MlpCall>& calls, const TileKernels& kernels, int threads,
                   const float* const* grads, const float* const* tapes, const GradientTargets* targets);

// Runs a prepared net, without a tape.
void run_mlp(const Mlp& mlp, const TileKernels& kernels, int threads);

}  // namespace llmdpd
