// Structures of the context in C++: what conditions the noise network: a state, and what it finds in the demonstration. The arithmetic is that of llmdpd/nn/context/retrieval.py, which the tests hold it to.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tile_kernels.h"

namespace llmdpd {

// One number that the networks see of an observation s.
struct Feature {
  enum Kind : std::int32_t {
    kValue,       // scale s[one]
    kNormalised,  // (s[one] - offset) / scale, within ±10
    kDifference,  // scale (s[other] - s[one]), 0 where a point of `present` is absent
    kNear,        // the hyperbolic tangent of that
  };
  std::int32_t kind, one, other, present[2];  // present: points, or -1
  float scale, offset;
};

struct Features {
  const Feature* features;
  int count;
};

// Points of the layout, each some columns of an observation; one whose numbers are all zero is absent.
struct Points {
  const std::int32_t* columns;
  const std::int32_t* ends;  // of each point in `columns`
  int count;
};

// Padded with zeros.
struct LayerNorm {
  const float *weight, *bias;
};

struct AttentionLayer {
  LayerNorm query_norm, forward_norm;
  PackedLayer query, out, widen, narrow;
};

// Widths of 0, and null pointers, are parts that are switched off.
struct ContextNet {
  int state_dim;
  Points points;
  Features own, geometry;
  int embedding_dim;  // of the timestep embedding
  int width, heads, layers;  // width 0: nothing is looked up
  PackedLayer query;
  const AttentionLayer* attention;
  LayerNorm norm;              // weight null: what attention finds is no part of the condition
  PackedLayer waypoint_query;  // packed_tiles null: no waypoints
  const float* similarity;       // [heads, compared]: weights of squared differences; null: none are taken
  int action_dim, lookaheads;
  int output_dim;

  int head_width() const { return width / heads; }
  int compared() const { return geometry.count + (embedding_dim > 0 ? 1 : 0); }
  int found_dim() const { return action_dim + lookaheads * geometry.count; }
};

// A demonstration as it is looked up, or several of one prompt: T steps, the last of which says nothing.
struct ContextPrompt {
  const float* query_init;  // the query's bias and the text's part of it, padded
  int steps, steps_padded;
  const float* bias;            // [steps_padded]: added to every score; -inf for what is no step
  const float* waypoint_bias;   // likewise
  const PackedLayer* keys;      // [layers, heads]: steps from a head's query
  const PackedLayer* values;    // [layers, heads]: a head's result from weights on the steps
  const PackedLayer* waypoint_keys;  // [heads]
  PackedLayer waypoints;             // [found_dim] from weights
  const float* there;                // [compared, steps_padded], or null
};

struct ContextBatch {
  const float* observations;  // [rows, S]
  const float* embedding;         // [rows, embedding_dim]
  const float* moments;       // [rows]: the time, in the unit that moments are compared in
  const ContextPrompt* prompts;
  const std::int64_t* prompt_of;  // [rows], or null: all under the first
  float* out;                     // [rows, output_dim]

  const ContextPrompt* prompt(std::ptrdiff_t row) const { return prompts + (prompt_of ? prompt_of[row] : 0); }
};

}  // namespace llmdpd
