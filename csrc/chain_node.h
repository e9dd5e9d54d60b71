// The reverse chain in training as one node: `reverse_diffusion.h` from the network's own weights on, the time embedding
// and the prompt's part of the first layer included.
#pragma once

#include <vector>

#include "noise_weights.h"
#include "reverse_diffusion.h"

namespace llmdpd {

struct ChainShown {
  std::ptrdiff_t states;
  int samples, action_dim, time_dim;
  const float* waves;  // [K, T]: sines and cosines of the time embedding, in the order of the steps
  Schedule schedule;
  Noise noise;
  bool need_state;  // whether the states' gradient is computed
};

class ChainNode {
 public:
  // given: state [B, S], prompt [1, Z] or [B, Z] where there is one, and the weights: see `NoiseWeights`. trunk: kernels
  // of the hidden layers' precision.
  ChainNode(const ChainShown& shown, const std::vector<Weight>& given, const LayerTools& tools,
            const TileKernels& trunk, bool prompted);
  // Without what the steps keep, and that.
  std::size_t tape_floats() const;
  std::size_t steps_tape_floats() const;
  std::ptrdiff_t gradient_numbers() const { return weights_.numbers; }

  // steps_tape: null where the pass backward is to compute the chain again. actions: [B, N, A].
  void forward(float* tape, float* steps_tape, float* actions);
  // The states' gradient is left as it is without `need_state`.
  void backward(float* tape, const float* steps_tape, const float* d_actions, float* gradients);

 private:
  struct Kept;
  void plan(Allocator& tape, Kept& kept) const;
  ChainCall call(const Kept& kept) const;

  ChainShown shown_;
  LayerTools tools_;
  const TileKernels& trunk_;
  NoiseWeights weights_;
};

}  // namespace llmdpd
