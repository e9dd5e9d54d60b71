// The context packed once, its prompts packed once, and acting by it: from observations to actions in one call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "actor.h"
#include "layers.h"
#include "memory.h"
#include "packing.h"
#include "sampler.h"
#include "tile/layer_kernels.h"

namespace llmdpd {

struct ContextSizes {
  int state_dim, width, heads, layers, action_dim, lookaheads;
};

// Null for parts that are switched off.
struct ContextWeights {
  Linear query;  // of the features and the timestep embedding; its bias is the prompts' (ContextPrompt)
  struct Attention {
    Norm query_norm, forward_norm;
    Linear query, out, widen, narrow;
  };
  std::vector<Attention> attention;
  Norm norm;
  Linear waypoint_query;
  const float* similarity;  // [heads, compared]
};

// The layout's points, and features in terms of an observation.
struct ContextFeatures {
  std::vector<std::int32_t> point_columns, point_ends;
  std::vector<Feature> own, geometry;
  std::vector<float> periods;  // of the timestep embedding's sines, in time steps; none: no embedding
  float time_unit;             // moments are compared in
};

class Context {
 public:
  Context(const ContextSizes& sizes, ContextFeatures features, const ContextWeights& weights,
          const TileKernels& kernels, const LayerKernels& layers);

  const ContextNet& net() const { return net_; }
  const ContextFeatures& features() const { return features_; }
  const TileKernels& kernels;
  const LayerKernels& layers;

 private:
  ContextFeatures features_;
  std::vector<AttentionLayer> attention_;
  ContextNet net_{};
  Arena memory_;
};

// Of P prompts, T steps each, each contiguous: what `RetrievalContext.remember` keeps. Null as in `ContextNet`.
struct PromptTensors {
  std::ptrdiff_t prompts;
  int prompt_dim, steps;
  const float* pooled;                       // [P, Z]
  const float* query_init;                   // [P, W]
  const float* bias;                         // [P, T]
  std::vector<const float*> keys, values;    // of each layer, [P, heads, T, W / heads]
  const float* waypoint_key;                 // [P, heads, T, W / heads]
  const float* waypoint_bias;                // [P, T]
  const float* waypoints;                    // [P, T, A + L G]
  const float* there;                        // [P, T, compared]
};

class Prompts {
 public:
  Prompts(std::shared_ptr<const Context> context, const PromptTensors& tensors);

  const Context& context() const { return *context_; }
  std::ptrdiff_t count() const { return count_; }
  int prompt_dim() const { return prompt_dim_; }
  int steps_padded() const { return steps_padded_; }
  const ContextPrompt* prompts() const { return prompts_.data(); }
  const float* pooled() const { return pooled_.data(); }

 private:
  std::shared_ptr<const Context> context_;
  std::ptrdiff_t count_;
  int prompt_dim_, steps_padded_;
  std::vector<float> pooled_;
  std::vector<ContextPrompt> prompts_;
  std::vector<PackedLayer> layers_;  // that the prompts point into
  Arena memory_;
};

// Where each of B states stands; its noise's key.
struct ActingBatch {
  std::ptrdiff_t states;
  const float* observations;      // [B, S]
  const std::int64_t* times;      // [B], time steps within the episodes
  const std::int64_t* prompt_of;  // [B], or null: all under the first
  const std::uint64_t* keys;      // [B]
};

// Features [rows, own] and geometry [rows, geometry] of observations [rows, S].
void read_features(const Context& context, std::ptrdiff_t rows, const float* observations, int threads, float* own,
                   float* geometry);
// The condition's state part [B, output_dim].
void run_context(const Prompts& prompts, const ActingBatch& batch, int threads, float* condition);
// One action for each state, [B, A]: by the actor where there is one, else the one sample of the sampler.
void act(const Prompts& prompts, const Sampler& sampler, const Actor* actor, const ActingBatch& batch, int threads,
         float* actions);

}  // namespace llmdpd
