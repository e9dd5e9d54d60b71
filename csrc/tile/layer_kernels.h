// What the object of one instruction set offers for layers with gradients, and the structures that it shares with its
// callers: linear layers behind a layer norm, attention to a memory, the retrieval of waypoints. All of it is in fp32.
// Rows of hidden numbers are padded: `stride` floats from one to the next, zeros where they have no number.
#pragma once

#include <cstddef>

#include "context_kernels.h"
#include "tile_kernels.h"

namespace llmdpd {

// out[outputs, inputs] = sum over rows of left[row][output] right[row][input]: a weight's gradient. `right` is padded.
struct Gram {
  const float* left;
  std::ptrdiff_t left_stride;
  const float* right;
  std::ptrdiff_t right_stride;
  std::ptrdiff_t rows;
  int outputs, inputs;
  float* out;
  std::ptrdiff_t out_stride;
  float* sums;  // [outputs]: of `left` over the rows, a bias's gradient; or null
};

// What a layer norm keeps of each row for its backward pass: mean and reciprocal deviation.
struct RowStats {
  float mean, scale;
};

// Linear layers on the same input, which is normalised first where `norm` has a weight. Without a layer the result is
// the normalised input itself, [rows, inputs].
struct LinearCall {
  std::ptrdiff_t rows;
  int inputs, layers;
  const float* x;  // [rows, inputs]
  LayerNorm norm;
  std::ptrdiff_t stride;     // of `input`
  float *input, *normed;     // kept, padded; the same memory where there is no norm
  RowStats* stats;           // kept; null where there is no norm
  const PackedLayer* forward;   // [layers], with biases
  const PackedLayer* backward;  // [layers], transposed
  const int* outputs;           // [layers]
  float* const* out;            // [layers, at least 1] of [rows, outputs]
};

struct LinearGradients {
  const float* const* out;  // [layers, at least 1], of the results
  float* x;                 // [rows, inputs]
  float* norm;              // [chunks, 2, stride]: of the norm's weight and bias, by chunk of rows; or null
};

// One attention layer with its feed-forward; G groups of M rows, each attending to its own memory of T steps.
struct AttentionCall {
  int groups, rows, steps;  // M rows, T steps
  int width, heads;
  int steps_padded;
  AttentionLayer layer;
  PackedLayer query_transposed, out_transposed, widen_transposed, narrow_transposed;
  const float* hidden;      // [G M, W]
  const float *key, *value;  // [G, T, W], heads side by side
  const float* bias;        // [G, T]: added to every score
  float* out;               // [G M, W]
  // Kept for the backward pass.
  std::ptrdiff_t stride, wide_stride;
  float *input, *normed, *query, *found, *middle, *forward_normed;  // [G M, stride]; queries are scaled
  float *wide, *active;                                             // [G M, wide_stride]
  float* weights;                                                   // [G M, heads, steps_padded]
  RowStats *stats, *forward_stats;                                  // [G M]

  int head_width() const { return width / heads; }
};

// Where the backward pass leaves what it computes; the gradients of the weights are sums over these (`Gram`).
struct AttentionGradients {
  const float* out;         // [G M, W], of the results
  float* hidden;            // [G M, W]
  float *key, *value;       // [G, T, W]
  float *d_out, *d_middle, *d_query;  // [G M, stride]
  float* d_wide;            // [G M, wide_stride]
  float* norms;             // [G, 2 norms, 2, stride]: of their weights and biases, by group
};

// What heads find of the raw demonstration; numbers as in `ContextNet`.
struct RetrievalCall {
  int groups, rows, steps;
  int width, heads, steps_padded;
  int action_dim, lookaheads, geometry, compared;
  const float* query;     // [G M, W]
  const float* key;       // [G, T, W]
  const float* bias;      // [G, T]
  const float* here;      // [G M, compared]; its first numbers are the geometry
  const float* there;     // [G, T, compared], or null
  const float* similarity;  // [heads, compared]
  const float* waypoints;  // [G, T, A + L G]
  float* out;             // [G M, heads (A + 2 L G)]
  float* weights;         // kept: [G M, heads, steps_padded]

  int head_width() const { return width / heads; }
  int found_dim() const { return action_dim + lookaheads * geometry; }
  int out_dim() const { return heads * (found_dim() + lookaheads * geometry); }
};

struct RetrievalGradients {
  const float* out;
  float* query;     // [G M, W]
  float* key;       // [G, T, W]
  float* similarity;  // [G, heads, compared], by group
};

// A step of AdamW, but for what differs between weights. `scale` is the gradient's, which cuts its norm.
struct AdamW {
  float rate, beta1, beta2, epsilon, decay;
  float mean_share, square_share;  // 1 - beta1^t, 1 - beta2^t
  float scale;
};

struct LayerKernels {
  int gram_rows;  // outputs that a task of `gram` computes

  void (*gram)(const Gram& gram, int first_output);

  // Rows first … first + rows - 1, a chunk of them.
  void (*linear_forward)(const LinearCall& call, std::ptrdiff_t first, std::ptrdiff_t rows, float* scratch);
  void (*linear_backward)(const LinearCall& call, const LinearGradients& gradients, std::ptrdiff_t first,
                          std::ptrdiff_t rows, int chunk, float* scratch);
  std::size_t (*linear_scratch)(const LinearCall& call, std::ptrdiff_t rows);

  void (*attention_forward)(const AttentionCall& call, int group, float* scratch);
  void (*attention_backward)(const AttentionCall& call, const AttentionGradients& gradients, int group, float* scratch);
  std::size_t (*attention_scratch)(const AttentionCall& call);

  void (*retrieval_forward)(const RetrievalCall& call, int group, float* scratch);
  void (*retrieval_backward)(const RetrievalCall& call, const RetrievalGradients& gradients, int group, float* scratch);
  std::size_t (*retrieval_scratch)(const RetrievalCall& call);

  // The context without gradients (context_kernels.h) of rows first_row … first_row + rows - 1, rows <= max_rows, of
  // prompts that have at most so many steps.
  std::size_t (*context_scratch)(const ContextNet& net, int most_steps_padded);
  void (*context_rows)(const ContextNet& net, const ContextBatch& batch, std::ptrdiff_t first_row, int rows,
                       int most_steps_padded, float* scratch);
  // Features [rows, own] and geometry [rows, geometry] of observations [rows, S].
  std::size_t (*feature_scratch)(const ContextNet& net);
  void (*feature_rows)(const ContextNet& net, const float* observations, std::ptrdiff_t rows, float* own,
                       float* geometry, float* scratch);

  // On `count` numbers each.
  double (*sum_of_squares)(const float* from, std::ptrdiff_t count);
  void (*adamw)(const AdamW& step, std::ptrdiff_t count, const float* gradient, float* mean, float* square,
                float* weight);
  void (*average)(float rate, std::ptrdiff_t count, const float* from, float* to);  // to += rate (from - to)
  void (*add)(std::ptrdiff_t count, const float* from, float* to);                   // to += from
};

}  // namespace llmdpd
