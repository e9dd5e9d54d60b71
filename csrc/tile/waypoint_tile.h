// Retrieval of waypoints, forward and backward, on the rows of one group.
#pragma once

#include "attention_tile.h"
#include "waypoint_math.h"

namespace {

using llmdpd::RetrievalCall;
using llmdpd::RetrievalGradients;

struct RetrievalScratch {
  std::ptrdiff_t stride, found_stride, weights_stride;
  float *query, *keys, *waypoints, *there, *scores, *found, *weights, *d_query, *zeros;
  std::ptrdiff_t floats;

  RetrievalScratch(const RetrievalCall& call, float* base) {
    ScratchParts parts(base);
    stride = llmdpd::padded(call.width, kWidth) + kWidth;
    found_stride = llmdpd::padded(call.found_dim(), kWidth);
    weights_stride = static_cast<std::ptrdiff_t>(call.heads) * call.steps_padded;
    const std::ptrdiff_t rows = call.rows, steps = call.steps_padded, each = llmdpd::padded(call.head_width(), kWidth);
    query = parts.take(rows * stride);
    keys = parts.take(steps * each);
    waypoints = parts.take((steps > found_stride ? steps : found_stride) * (call.steps > call.found_dim() ? call.steps : call.found_dim()));
    there = parts.take(static_cast<std::ptrdiff_t>(call.compared) * steps);
    scores = parts.take(steps);
    found = parts.take(rows * call.heads * found_stride);
    weights = parts.take(rows * weights_stride);
    d_query = parts.take(rows * stride);
    zeros = parts.take(steps + found_stride + stride);
    floats = parts.used();
  }
};

std::size_t retrieval_scratch(const RetrievalCall& call) {
  float origin[1];
  return static_cast<std::size_t>(RetrievalScratch(call, origin).floats);
}

// The group's moments [compared, steps_padded].
inline void transpose_moments(const RetrievalCall& call, int group, float* there) {
  const float* from = call.there + static_cast<std::ptrdiff_t>(group) * call.steps * call.compared;
  for (int i = 0; i < call.compared; ++i) {
    for (int t = 0; t < call.steps_padded; ++t) {
      there[static_cast<std::ptrdiff_t>(i) * call.steps_padded + t] = t < call.steps ? from[t * call.compared + i] : 0.0f;
    }
  }
}

// The scale is in the query, so that it is in the gradient of the keys too.
inline void load_query(const RetrievalCall& call, std::ptrdiff_t first, const RetrievalScratch& scratch) {
  pad_rows(call.query + first * call.width, call.width, scratch.query, scratch.stride, call.rows);
  const Vec scale = broadcast(1.0f / __builtin_sqrtf(static_cast<float>(call.head_width())));
  for (std::ptrdiff_t i = 0; i < call.rows * scratch.stride; i += kWidth) {
    store(scratch.query + i, scale * load(scratch.query + i));
  }
}

void retrieval_forward(const RetrievalCall& call, int group, float* memory) {
  const RetrievalScratch scratch(call, memory);
  const std::ptrdiff_t first = static_cast<std::ptrdiff_t>(group) * call.rows, all_heads = scratch.weights_stride;
  const int each = call.head_width(), rows = call.rows, steps = call.steps;
  float* weights = call.weights + first * all_heads;
  load_query(call, first, scratch);
  pad_scores(call.bias + static_cast<std::ptrdiff_t>(group) * steps, steps, call.steps_padded, scratch.scores);
  for (int head = 0; head < call.heads; ++head) {
    const float* key = call.key + static_cast<std::ptrdiff_t>(group) * steps * call.width + head * each;
    apply(to_steps(key, call.width, each, steps, scratch.keys), {scratch.query + head * each, scratch.stride},
          {scratch.scores, 0}, {weights + head * call.steps_padded, all_heads}, rows);
  }
  if (call.there) {
    transpose_moments(call, group, scratch.there);
    const Moments moments{scratch.there, call.similarity, call.heads, call.compared, call.steps_padded};
    for (int r = 0; r < rows; ++r) {
      subtract_differences(moments, call.here + (first + r) * call.compared, weights + r * all_heads);
    }
  }
  softmax(weights, call.steps_padded, call.steps_padded, static_cast<std::ptrdiff_t>(rows) * call.heads);
  const int found_dim = call.found_dim();
  const float* raw = call.waypoints + static_cast<std::ptrdiff_t>(group) * steps * found_dim;
  clear(scratch.zeros, scratch.found_stride);
  apply(from_steps(raw, found_dim, found_dim, steps, scratch.waypoints), {weights, call.steps_padded},
        {scratch.zeros, 0}, {scratch.found, scratch.found_stride}, static_cast<std::ptrdiff_t>(rows) * call.heads);
  for (int r = 0; r < rows; ++r) {
    const float* here = call.here + (first + r) * call.compared;
    float* to = call.out + (first + r) * call.out_dim();
    for (int head = 0; head < call.heads; ++head) {
      const std::ptrdiff_t place = static_cast<std::ptrdiff_t>(r) * call.heads + head;
      to = write_found(scratch.found + place * scratch.found_stride, call.action_dim, call.lookaheads, call.geometry,
                       here, weights[place * call.steps_padded + steps - 1], to);
    }
  }
}

// From the gradient of a row's results to that of what its heads found, `found` [heads, found_stride]; and to that of
// each head's weight on the step that says nothing, as far as it goes past what was found.
inline void found_backward(const RetrievalCall& call, const float* out, const float* d_out, const float* here,
                           std::ptrdiff_t found_stride, float* found, float* nothing) {
  const int found_dim = call.found_dim(), far = call.lookaheads * call.geometry;
  for (int head = 0; head < call.heads; ++head) {
    const float *bent = out + found_dim, *d_bent = d_out + found_dim;
    float *d = found + head * found_stride, last = 0.0f;
    for (int i = 0; i < found_dim; ++i) d[i] = d_out[i];
    for (int i = 0; i < far; ++i) {
      d[call.action_dim + i] += kNearness * d_bent[i] * (1.0f - bent[i] * bent[i]);
      last += d[call.action_dim + i] * here[i % call.geometry];
    }
    for (std::ptrdiff_t i = found_dim; i < found_stride; ++i) d[i] = 0.0f;
    nothing[head] = last;
    out += found_dim + far;
    d_out += found_dim + far;
  }
}

// The gradient of the similarity' weights, [heads, compared]: minus the squared differences, weighted by the scores'.
void similarity_backward(const RetrievalCall& call, std::ptrdiff_t first, const RetrievalScratch& scratch, float* out) {
  for (int head = 0; head < call.heads; ++head) {
    for (int i = 0; i < call.compared; ++i) {
      const float* there = scratch.there + static_cast<std::ptrdiff_t>(i) * call.steps_padded;
      Vec sums{};
      for (int r = 0; r < call.rows; ++r) {
        const Vec here = broadcast(call.here[(first + r) * call.compared + i]);
        const float* d = scratch.weights + r * scratch.weights_stride + head * call.steps_padded;
        for (int t = 0; t < call.steps_padded; t += kWidth) {
          const Vec away = here - load(there + t);
          sums = fma(away * away, load(d + t), sums);
        }
      }
      out[head * call.compared + i] = -sum_of(sums);
    }
  }
}

void retrieval_backward(const RetrievalCall& call, const RetrievalGradients& gradients, int group, float* memory) {
  const RetrievalScratch scratch(call, memory);
  const std::ptrdiff_t first = static_cast<std::ptrdiff_t>(group) * call.rows, all_heads = scratch.weights_stride;
  const int each = call.head_width(), rows = call.rows, steps = call.steps, found_dim = call.found_dim();
  const float* weights = call.weights + first * all_heads;
  float* nothing = scratch.d_query;  // until the queries' gradient comes
  for (int r = 0; r < rows; ++r) {
    found_backward(call, call.out + (first + r) * call.out_dim(), gradients.out + (first + r) * call.out_dim(),
                   call.here + (first + r) * call.compared, scratch.found_stride,
                   scratch.found + static_cast<std::ptrdiff_t>(r) * call.heads * scratch.found_stride,
                   nothing + r * call.heads);
  }
  clear(scratch.zeros, call.steps_padded + scratch.stride);
  const float* raw = call.waypoints + static_cast<std::ptrdiff_t>(group) * steps * found_dim;
  const std::ptrdiff_t places = static_cast<std::ptrdiff_t>(rows) * call.heads;
  apply(to_steps(raw, found_dim, found_dim, steps, scratch.waypoints), {scratch.found, scratch.found_stride},
        {scratch.zeros, 0}, {scratch.weights, call.steps_padded}, places);
  for (std::ptrdiff_t place = 0; place < places; ++place) {
    scratch.weights[place * call.steps_padded + steps - 1] += nothing[place];
  }
  softmax_backward(weights, scratch.weights, call.steps_padded, call.steps_padded, places);
  float* similarity = gradients.similarity + static_cast<std::ptrdiff_t>(group) * call.heads * call.compared;
  if (call.there) {
    transpose_moments(call, group, scratch.there);
    similarity_backward(call, first, scratch, similarity);
  }
  load_query(call, first, scratch);
  for (int head = 0; head < call.heads; ++head) {
    const std::ptrdiff_t part = static_cast<std::ptrdiff_t>(group) * steps * call.width + head * each;
    const float* d_scores = scratch.weights + head * call.steps_padded;
    gram_any(d_scores, all_heads, scratch.query + head * each, scratch.stride, rows, gradients.key + part, call.width,
             steps, each);
    apply(from_steps(call.key + part, call.width, each, steps, scratch.keys), {d_scores, all_heads},
          {scratch.zeros, 0}, {scratch.d_query + head * each, scratch.stride}, rows);
  }
  const Vec scale = broadcast(1.0f / __builtin_sqrtf(static_cast<float>(each)));
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < call.width; c += kWidth) {
      float* at = scratch.d_query + r * scratch.stride + c;
      store(at, scale * load(at));
    }
  }
  unpad_rows(scratch.d_query, scratch.stride, gradients.query + first * call.width, call.width, rows);
}

}  // namespace
