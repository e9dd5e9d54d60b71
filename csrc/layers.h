// Layers with gradients: packed once a call, computed group by group or chunk by chunk on several threads. Weight
// gradients are sums over all rows in one order: results don't depend on the number of threads.
#pragma once

#include <cstddef>
#include <vector>

#include "packing.h"
#include "tile/layer_kernels.h"

namespace llmdpd {

// A weight [outputs, inputs] and its bias, as torch keeps them.
struct Linear {
  Matrix weight;
  const float* bias;
};
struct Norm {
  const float *weight, *bias;
};
// Where their gradients go, contiguous.
struct LinearTarget {
  float *weight, *bias;
};
struct NormTarget {
  float *weight, *bias;
};

// Packed for the forward pass, bias and norm padded; what is null stays null.
PackedLayer pack_linear(const Linear& linear, const TileKernels& tile, Allocator& memory, PackList* later = nullptr);
LayerNorm pack_norm(const Norm& norm, int width, const TileKernels& tile, Allocator& memory);

struct LayerTools {
  const TileKernels& tile;
  const LayerKernels& layers;
  int threads;
};

// Linear layers on one input [rows, inputs], normalised first where `norm` has a weight. Without a layer the one result
// is the normalised input [rows, inputs].
struct LinearInputs {
  std::ptrdiff_t rows;
  int inputs;
  const float* x;
  Norm norm;
  std::vector<Linear> layers;
};
std::size_t linear_tape_floats(std::ptrdiff_t rows, int inputs, bool norm, const LayerTools& tools);
void linear_forward(const LinearInputs& in, const std::vector<float*>& out, float* tape, const LayerTools& tools);
void linear_backward(const LinearInputs& in, const std::vector<const float*>& d_out, float* tape, float* d_x,
                     NormTarget norm, const std::vector<LinearTarget>& targets, const LayerTools& tools);

// One attention layer with its feed-forward: see `AttentionCall`.
struct AttentionInputs {
  int groups, rows, steps, width, wide, heads;
  const float *hidden, *key, *value, *bias;
  Norm query_norm, forward_norm;
  Linear query, out, widen, narrow;
};
struct AttentionTargets {
  float *hidden, *key, *value;
  NormTarget query_norm, forward_norm;
  LinearTarget query, out, widen, narrow;
};
std::size_t attention_tape_floats(const AttentionInputs& in, const LayerTools& tools);
void attention_forward(const AttentionInputs& in, float* out, float* tape, const LayerTools& tools);
void attention_backward(const AttentionInputs& in, const float* d_out, float* tape, const AttentionTargets& targets,
                        const LayerTools& tools);

// Retrieval of waypoints: `call` without what is kept; its weights are, [G M, heads, steps_padded].
std::size_t retrieval_tape_floats(const RetrievalCall& call, const LayerTools& tools);
void retrieval_forward(RetrievalCall call, float* tape, const LayerTools& tools);
// The similarity' gradient: [heads, compared].
void retrieval_backward(RetrievalCall call, const float* d_out, float* tape, float* d_query, float* d_key,
                        float* d_similarity, const LayerTools& tools);

}  // namespace llmdpd
