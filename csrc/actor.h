// Best-of-N acting: N actions are sampled for each state, and one of them is selected by its value.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "memory.h"
#include "packing.h"
#include "sampler.h"

namespace llmdpd {

// A critic's weights as they were when it was made. Its first layer's inputs are [state, action, prompt], prompt 0 wide
// where it does not see the prompts.
class PackedCritic {
 public:
  PackedCritic(int state_dim, int action_dim, int prompt_dim, const float* first_weight, const float* first_bias,
               const TrunkWeights& trunk, const TileKernels& kernels);

  const int state_dim, action_dim, prompt_dim;
  const TileKernels& kernels;
  Trunk3 trunk;
  PackedLayer state, action, prompt;
  const float* bias;

 private:
  Arena memory_;
};

struct Selection {
  bool soft;  // by softmax over min(Q_1, Q_2) / temperature; else its maximum
  double temperature;
};

class Actor {
 public:
  Actor(std::shared_ptr<const Sampler> sampler, std::shared_ptr<const PackedCritic> q1,
        std::shared_ptr<const PackedCritic> q2, int samples, Selection selection);

  const Sampler& sampler() const { return *sampler_; }

  // One action for each state, [states, A]: state [states, S], prompt [Z] or [states, Z], a key for each state.
  void act(std::ptrdiff_t states, const float* state, const float* prompt, bool prompt_per_state,
           const std::uint64_t* keys, int threads, float* actions) const;

 private:
  std::shared_ptr<const Sampler> sampler_;
  std::shared_ptr<const PackedCritic> critics_[2];
  int samples_;
  Selection selection_;
};

}  // namespace llmdpd
