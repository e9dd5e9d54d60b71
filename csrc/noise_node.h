// The noise network in training, forward and backward: what `llmdpd.diffusion.NoiseMLP` defines in PyTorch. What
// depends on the diffusion step alone is computed once a step, what depends on the prompt alone once a prompt.
#pragma once

#include <cstdint>
#include <vector>

#include "noise_weights.h"

namespace llmdpd {

// B noisy actions at diffusion steps, of which K differ.
struct NoisyActions {
  std::ptrdiff_t rows;
  int action_dim, levels, time_dim;
  const float* actions;       // [B, A]
  const float* waves;         // [K, T]: sines and cosines of the time embedding
  const std::int64_t* place;  // [B]: which of them is a row's
};

class NoiseNode {
 public:
  // given: state [B, S], prompt [P, Z] where there is one, and the weights: see `NoiseWeights`. trunk: kernels of the
  // hidden layers' precision.
  NoiseNode(const NoisyActions& noisy, const std::vector<Weight>& given, const LayerTools& tools,
            const TileKernels& trunk, bool prompted = true);
  // Without what the hidden layers keep, and that.
  std::size_t tape_floats() const;
  std::size_t hidden_tape_floats() const;
  std::ptrdiff_t gradient_numbers() const { return weights_.numbers; }
  int outputs() const { return weights_.layers[2].outputs(); }

  // hidden_tape: null where the pass backward is to compute the hidden layers again.
  void forward(float* tape, float* hidden_tape, float* out);  // [B, A]
  void backward(float* tape, const float* hidden_tape, const float* d_out, float* gradients);

 private:
  struct Kept;
  void plan(Allocator& tape, Kept& kept) const;
  MlpCall call(const Kept& kept) const;
  void backward_time(const Kept& kept, const float* d_x, float* gradients) const;

  NoisyActions noisy_;
  LayerTools tools_;
  const TileKernels& trunk_;
  NoiseWeights weights_;
};

}  // namespace llmdpd
