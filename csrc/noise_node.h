// The noise network in training, forward and backward: what `llmdpd.diffusion.NoiseMLP` defines in PyTorch. What
// depends on the diffusion step alone is computed once a step, what depends on the prompt alone once a prompt.
#pragma once

#include <cstdint>
#include <vector>

#include "mish_mlp.h"
#include "node.h"

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
  // given: state [B, S], prompt [P, Z], those of P equal groups of the states, and the weights in the order of
  // `WEIGHTS` of llmdpd/ops/noise_net.py. trunk: kernels of the hidden layers' precision.
  NoiseNode(const NoisyActions& noisy, const std::vector<Weight>& given, const LayerTools& tools,
            const TileKernels& trunk);
  // Without what the hidden layers keep, and that.
  std::size_t tape_floats() const;
  std::size_t hidden_tape_floats() const;
  std::ptrdiff_t gradient_numbers() const { return numbers_; }
  int outputs() const { return layers_[2].outputs(); }

  // hidden_tape: null where the pass backward is to compute the hidden layers again.
  void forward(float* tape, float* hidden_tape, float* out);  // [B, A]
  void backward(float* tape, const float* hidden_tape, const float* d_out, float* gradients);

 private:
  struct Kept;
  void plan(Allocator& tape, Kept& kept) const;
  MlpCall call(const Kept& kept) const;
  int own_dim() const { return noisy_.action_dim + noisy_.time_dim + state_.columns; }
  void backward_time(Kept& kept, const float* d_x, float* gradients) const;

  NoisyActions noisy_;
  LayerTools tools_;
  const TileKernels& trunk_;
  PlainWeights state_{}, prompt_{};
  LinearWeights time_first_{}, time_second_{}, first_{};
  std::vector<LinearWeights> layers_;
  std::ptrdiff_t numbers_ = 0;
};

}  // namespace llmdpd
