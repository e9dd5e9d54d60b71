// Sampling without gradients: a network packed once for many calls, and a sampler's coefficients bound to it.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "memory.h"
#include "packing.h"
#include "reverse_diffusion.h"

namespace llmdpd {

struct NetDims {
  int action, time, state, prompt, hidden;
};

// The noise network's weights as they were when it was made. Its first layer's inputs are [a_k, time, state, prompt].
class PackedNet {
 public:
  PackedNet(const NetDims& dims, const float* first_weight, const float* first_bias, const TrunkWeights& trunk,
            const TileKernels& kernels);

  const NetDims dims;
  const TileKernels& kernels;
  Trunk3 trunk;
  PackedLayer action, time, state, prompt;
  const float* bias;  // b1, padded

 private:
  Arena memory_;
};

// Where a call's rows come from and go to.
struct SamplerBatch {
  std::ptrdiff_t states;
  int samples;
  const float* state;   // [states, S]
  const float* prompt;  // [Z] or [states, Z]
  bool prompt_per_state;
  Noise noise;
};

class Sampler {
 public:
  // table [steps]; time_embedding [steps, T].
  Sampler(std::shared_ptr<const PackedNet> net, std::vector<StepCoefficients> table, const float* time_embedding,
          float start, float clip);

  const PackedNet& net() const { return *net_; }
  int steps() const { return static_cast<int>(table_.size()); }

  // actions: [states * samples, A]. Callable from several threads at once.
  void run(const SamplerBatch& batch, int threads, float* actions) const;

 private:
  // W_z z + b1 of the last prompt that served a whole batch: in an episode it is always the same.
  struct PromptBase {
    std::vector<float> prompt, base;
  };
  std::shared_ptr<const PromptBase> prompt_base(const float* prompt) const;

  std::shared_ptr<const PackedNet> net_;
  std::vector<StepCoefficients> table_;
  std::vector<float> tau_;
  float start_, clip_;
  mutable std::shared_ptr<const PromptBase> last_;  // read and written atomically
};

}  // namespace llmdpd
