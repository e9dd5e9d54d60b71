// The retrieval context in training: reading prompts, and states under them, forward and backward; what
// `llmdpd.nn.context.retrieval` defines in PyTorch. P prompts of T steps; B states in P equal groups.
#pragma once

#include <array>
#include <vector>

#include "node.h"

namespace llmdpd {

// Which parts there are, and the sizes that weights do not tell.
struct ContextShape {
  bool text;
  int encoder_layers, encoder_heads;
  int layers, heads;
  bool waypoints, similarity;
  int action_dim, geometry;
};

// What is known of prompts; null for what is not there.
struct PromptsShown {
  int prompts, steps;
  int text_dim, token_dim, embedded_dim;
  const float* text;                         // [P, text_dim]
  const float *keep_text, *keep_trajectory;  // [P]: which are given, ones and zeros
  const float* tokens;                       // [P T, token_dim]: what the encoder reads
  const float* embedded;                     // [P T, embedded_dim]: the timestep embedding
  const float *mask, *bias;                  // [P, T]: 1 where a step is real; 0 there and -inf elsewhere
};

// From prompts to their vectors, and to keys and values of each attention layer and the waypoints' keys.
class PromptReading {
 public:
  // weights: `ContextShape.prompt_weights` of llmdpd/ops/reading.py has their order.
  PromptReading(const ContextShape& shape, const PromptsShown& shown, const std::vector<Weight>& weights,
                const LayerTools& tools);
  std::size_t tape_floats() const;
  std::ptrdiff_t gradient_numbers() const { return numbers_; }
  int vector_dim() const { return text_dim() + head_.back().outputs(); }
  int width() const { return step_.outputs(); }
  std::size_t rows_count() const { return layers_.size() * 2 + (shape_.waypoints ? 1 : 0); }

  // pooled: [P, vector_dim]. rows: [P, T + 1, width] each; the last step is the one that says nothing.
  void forward(float* tape, float* pooled, const std::vector<float*>& rows);
  void backward(float* tape, const float* d_pooled, const std::vector<const float*>& d_rows, float* gradients);

 private:
  struct EncoderLayer {
    NormWeights norm1, norm2;
    PlainWeights projection, projection_bias;
    LinearWeights out, widen, narrow;
    Linear part(int which) const;  // query, key, value
    LinearTarget part_target(int which, float* gradients) const;
  };
  struct MemoryLayer {
    NormWeights norm;
    LinearWeights key, value;
  };
  struct Kept;  // what a pass keeps, in the tape
  void plan(Allocator& tape, Kept& kept) const;
  int text_dim() const { return shape_.text ? text_head_.back().outputs() : 0; }
  std::ptrdiff_t steps() const { return static_cast<std::ptrdiff_t>(shown_.prompts) * shown_.steps; }
  void backward_memory(Kept& kept, const std::vector<const float*>& d_rows, float* d_encoded, float* gradients) const;
  void backward_encoder(Kept& kept, float* d_encoded, float* gradients) const;

  ContextShape shape_;
  PromptsShown shown_;
  LayerTools tools_;
  std::vector<LinearWeights> text_head_, head_;
  LinearWeights embed_{}, step_{}, waypoint_key_{};
  PlainWeights position_{}, nothing_{};
  std::vector<EncoderLayer> encoder_;
  NormWeights encoder_norm_{};
  std::vector<MemoryLayer> layers_;
  std::ptrdiff_t numbers_ = 0;
};

// What is known of states, and of the prompts that they are under; null for what is not there.
struct StatesSeen {
  int prompts, rows;  // a prompt
  int steps;          // T + 1
  int own_dim, compared, waypoint_dim;
  const float* own;                    // [B, own_dim]
  const float* here;                   // [B, compared]
  const float *bias, *waypoint_bias;   // [P, T + 1]
  const float *there, *waypoints;      // [P, T + 1, compared], [P, T + 1, waypoint_dim]
};

// From states to their part of the condition, by prompts that were read.
class StateReading {
 public:
  // given: pooled [P, Z]; keys and values [P (T + 1), W] as `PromptReading` made them, the weights in the order of
  // `ContextShape.state_weights` of llmdpd/ops/reading.py.
  StateReading(const ContextShape& shape, const StatesSeen& seen, const std::vector<Weight>& given,
               const LayerTools& tools);
  std::size_t tape_floats() const;
  std::ptrdiff_t gradient_numbers() const { return numbers_; }
  std::ptrdiff_t states() const { return static_cast<std::ptrdiff_t>(seen_.prompts) * seen_.rows; }
  int condition_dim() const { return seen_.own_dim + (layers_.empty() ? 0 : width()) + found_dim(); }

  void forward(float* tape, float* condition);  // [B, condition_dim]
  void backward(float* tape, const float* d_condition, float* gradients);

 private:
  struct Layer {
    PlainWeights key, value;
    NormWeights query_norm, forward_norm;
    LinearWeights query, out, widen, narrow;
  };
  struct Kept;
  void plan(Allocator& tape, Kept& kept) const;
  int width() const { return query_.outputs(); }
  int text_dim() const { return query_.inputs() - seen_.own_dim; }
  int found_dim() const;
  RetrievalCall retrieval(const Kept& kept) const;
  void backward_query(Kept& kept, const float* d_hidden, float* gradients) const;

  ContextShape shape_;
  StatesSeen seen_;
  LayerTools tools_;
  PlainWeights pooled_{}, waypoint_key_{}, likeness_{};
  LinearWeights query_{}, waypoint_query_{};
  std::vector<Layer> layers_;
  NormWeights norm_{};
  std::ptrdiff_t numbers_ = 0;
};

}  // namespace llmdpd
