// What the nodes of the noise network (noise_node.h, chain_node.h) share: its weights in their order, its time
// embedding, and the part of its first layer that the prompt has.
#pragma once

#include <cstdint>
#include <vector>

#include "mish_mlp.h"
#include "node.h"

namespace llmdpd {

// The state, the prompts where the network reads any, and the weights in the order of `WEIGHTS` of
// llmdpd/ops/noise_net.py. The first layer's columns are [a, time, state, prompt].
struct NoiseWeights {
  // Throws std::invalid_argument for shapes that don't fit each other, or so many rows of states.
  NoiseWeights(const std::vector<Weight>& given, bool prompted, std::ptrdiff_t rows, int action_dim, int time_dim);

  PlainWeights state{}, prompt{};  // prompt: [P, Z], of P equal groups of the states; no data where there is none
  LinearWeights time_first{}, time_second{}, first{};
  std::vector<LinearWeights> layers;
  std::ptrdiff_t numbers = 0;  // of all gradients
  int action_dim, time_dim;

  int hidden() const { return first.outputs(); }
  int own_dim() const { return action_dim + time_dim + state.columns; }
  Matrix columns(int begin, int count) const {
    const Matrix& weight = first.layer.weight;
    return {weight.data + begin, weight.stride, weight.outputs, count};
  }
  TrunkWeights trunk() const;
  void add_targets(float* gradients, GradientTargets& targets) const;
  // Columns of the first layer's gradient, from [H, count].
  void write_columns(const float* from, int begin, int count, float* gradients, const LayerTools& tools) const;
};

// The time embedding [K, T] of K diffusion steps, from their sines and cosines `waves` [K, T].
class TimePass {
 public:
  void plan(const float* waves, int levels, const NoiseWeights& weights, const LayerTools& tools, Allocator& tape);
  const float* forward(const LayerTools& tools);
  // The embedding, in the tape.
  const float* kept() const { return rows_; }
  void backward(const float* d_rows, float* gradients, const LayerTools& tools) const;

 private:
  LinearPass first_, second_;
  LinearWeights first_weights_{}, second_weights_{};
  int levels_ = 0;
  // Before Mish, tanh(ln(1 + e^x)), Mish, the embedding.
  float *hidden_ = nullptr, *bent_ = nullptr, *active_ = nullptr, *rows_ = nullptr;
};

// W_z z + b1 of each prompt [P, H]; of none, b1 alone [H].
class PromptPass {
 public:
  void plan(const NoiseWeights& weights, const LayerTools& tools, Allocator& tape);
  const float* forward(const LayerTools& tools);
  // What the pass forward returned, from its tape.
  const float* kept() const { return init_ ? init_ : weights_->first.layer.bias; }
  // d_out [P, H], or [H].
  void backward(const float* d_out, float* gradients, const LayerTools& tools) const;

 private:
  const NoiseWeights* weights_ = nullptr;
  LinearPass pass_;
  float* init_ = nullptr;
};

}  // namespace llmdpd
