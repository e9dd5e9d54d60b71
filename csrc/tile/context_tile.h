// The retrieval context on a tile of rows: features of the states, attention to the demonstration, waypoints.
#pragma once

#include "context_kernels.h"
#include "waypoint_math.h"

namespace {

using llmdpd::AttentionLayer;
using llmdpd::ContextBatch;
using llmdpd::ContextNet;
using llmdpd::ContextPrompt;
using llmdpd::Feature;
using llmdpd::Features;
using llmdpd::Points;

constexpr float kFeatureBound = 10.0f;

// A tile's memory; rows of hidden numbers have a vector more than they need, into which a head's padding may run.
struct ContextScratch {
  std::ptrdiff_t hidden_stride, wide_stride, found_stride, compared;
  float *hidden, *normed, *query, *found, *wide, *weights, *here, *waypoints, *present;
  std::ptrdiff_t floats;

  ContextScratch(const ContextNet& net, int steps_padded, float* base) {
    const std::ptrdiff_t rows = kMaxBlock, heads = net.heads > 0 ? net.heads : 1;
    hidden_stride = llmdpd::padded(net.width, kWidth) + kWidth;
    wide_stride = llmdpd::padded(2 * net.width, kWidth) + kWidth;
    found_stride = llmdpd::padded(net.found_dim(), kWidth);
    compared = llmdpd::padded(net.compared() > net.own.count ? net.compared() : net.own.count, kWidth);
    ScratchParts parts(base);
    hidden = parts.take(rows * hidden_stride);
    normed = parts.take(rows * hidden_stride);
    query = parts.take(rows * hidden_stride);
    found = parts.take(rows * hidden_stride);
    wide = parts.take(rows * wide_stride);
    weights = parts.take(rows * heads * steps_padded);
    here = parts.take(rows * compared);
    waypoints = parts.take(rows * heads * found_stride);
    present = parts.take(net.points.count);
    floats = parts.used();
  }
};

inline void find_present(const Points& points, const float* state, float* present) {
  std::int32_t column = 0;
  for (int p = 0; p < points.count; ++p) {
    present[p] = 0.0f;
    for (; column < points.ends[p]; ++column) {
      if (state[points.columns[column]] != 0.0f) present[p] = 1.0f;  // a NaN too
    }
  }
}

// `out` has room for whole vectors.
void read_features(const Features& features, const float* state, const float* present, float* out) {
  bool near = false;
  for (int i = 0; i < features.count; ++i) {
    const Feature& f = features.features[i];
    float x;
    if (f.kind == Feature::kValue) {
      x = f.scale * state[f.one];
    } else if (f.kind == Feature::kNormalised) {
      x = (state[f.one] - f.offset) / f.scale;
      x = x > kFeatureBound ? kFeatureBound : x < -kFeatureBound ? -kFeatureBound : x;
    } else {
      x = f.scale * (state[f.other] - state[f.one]);
      for (const std::int32_t point : f.present) x *= point < 0 ? 1.0f : present[point];
      near = near || f.kind == Feature::kNear;
    }
    out[i] = x;
  }
  if (!near) return;
  for (int first = 0; first < features.count; first += kWidth) {
    float bent[kWidth];
    store(bent, hyperbolic_tangent(load(out + first)));
    for (int i = first; i < features.count && i < first + kWidth; ++i) {
      if (features.features[i].kind == Feature::kNear) out[i] = bent[i - first];
    }
  }
}

// Rows first … first + rows - 1 of a tile, all under one prompt.
struct Group {
  const ContextPrompt* prompt;
  int first, rows;
};

// One attention layer and its feed-forward, onto scratch.hidden.
void attend(const ContextNet& net, const AttentionLayer& layer, int number, const Group* groups, int count, int rows,
            const ContextScratch& scratch) {
  const std::ptrdiff_t stride = scratch.hidden_stride;
  const int heads = net.heads, each = net.head_width();
  normalise(layer.query_norm, net.width, scratch.hidden, scratch.normed, stride, rows);
  apply(layer.query, {scratch.normed, stride}, {layer.query.bias, 0}, {scratch.query, stride}, rows);
  for (int g = 0; g < count; ++g) {
    const Group& group = groups[g];
    const ContextPrompt& prompt = *group.prompt;
    const std::ptrdiff_t from = group.first * stride;
    for (int head = 0; head < heads; ++head) {
      const PackedLayer& value = prompt.values[number * heads + head];
      apply(prompt.keys[number * heads + head], {scratch.query + from + head * each, stride}, {prompt.bias, 0},
            {scratch.weights, prompt.steps_padded}, group.rows);
      softmax(scratch.weights, prompt.steps_padded, prompt.steps_padded, group.rows);
      apply(value, {scratch.weights, prompt.steps_padded}, {value.bias, 0}, {scratch.found + from + head * each, stride},
            group.rows);
    }
  }
  apply(layer.out, {scratch.found, stride}, {layer.out.bias, 0}, {scratch.normed, stride}, rows);
  add_rows(scratch.normed, net.width, scratch.hidden, stride, rows);
  normalise(layer.forward_norm, net.width, scratch.hidden, scratch.normed, stride, rows);
  apply(layer.widen, {scratch.normed, stride}, {layer.widen.bias, 0}, {scratch.wide, scratch.wide_stride}, rows);
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < 2 * net.width; c += kWidth) {
      float* at = scratch.wide + r * scratch.wide_stride + c;
      store(at, gelu(load(at)));
    }
  }
  apply(layer.narrow, {scratch.wide, scratch.wide_stride}, {layer.narrow.bias, 0}, {scratch.normed, stride}, rows);
  add_rows(scratch.normed, net.width, scratch.hidden, stride, rows);
}

// What each head finds of the raw demonstration, and how far the state is from it: heads (A + 2 L G) numbers a row.
void retrieve(const ContextNet& net, const Group& group, const ContextScratch& scratch, float* out,
              std::ptrdiff_t out_stride) {
  const ContextPrompt& prompt = *group.prompt;
  const int heads = net.heads, each = net.head_width();
  const std::ptrdiff_t steps = prompt.steps_padded;
  for (int head = 0; head < heads; ++head) {
    apply(prompt.waypoint_keys[head],
          {scratch.query + group.first * scratch.hidden_stride + head * each, scratch.hidden_stride},
          {prompt.waypoint_bias, 0}, {scratch.weights + head * steps, heads * steps}, group.rows);
  }
  const Moments moments{prompt.there, net.similarity, heads, net.compared(), steps};
  for (int r = 0; r < group.rows && prompt.there; ++r) {
    subtract_differences(moments, scratch.here + (group.first + r) * scratch.compared,
                         scratch.weights + r * heads * steps);
  }
  softmax(scratch.weights, steps, prompt.steps_padded, static_cast<std::ptrdiff_t>(group.rows) * heads);
  apply(prompt.waypoints, {scratch.weights, steps}, {prompt.waypoints.bias, 0}, {scratch.waypoints, scratch.found_stride},
        static_cast<std::ptrdiff_t>(group.rows) * heads);
  for (int r = 0; r < group.rows; ++r) {
    const float* here = scratch.here + (group.first + r) * scratch.compared;
    float* to = out + (group.first + r) * out_stride;
    for (int head = 0; head < heads; ++head) {
      const std::ptrdiff_t place = r * heads + head;
      to = write_found(scratch.waypoints + place * scratch.found_stride, net.action_dim, net.lookaheads,
                       net.geometry.count, here, scratch.weights[place * steps + prompt.steps - 1], to);
    }
  }
}

// Features, timestep embedding and what is compared of each row.
void read_states(const ContextNet& net, const ContextBatch& batch, std::ptrdiff_t first_row, int rows,
                 const ContextScratch& scratch) {
  for (int r = 0; r < rows; ++r) {
    const std::ptrdiff_t row = first_row + r;
    const float* state = batch.observations + row * net.state_dim;
    float *out = batch.out + row * net.output_dim, *here = scratch.here + r * scratch.compared;
    find_present(net.points, state, scratch.present);
    read_features(net.own, state, scratch.present, here);  // there is room for whole vectors
    for (int i = 0; i < net.own.count; ++i) out[i] = here[i];
    for (int i = 0; i < net.embedding_dim; ++i) out[net.own.count + i] = batch.embedding[row * net.embedding_dim + i];
    if (!net.waypoint_query.packed_tiles) continue;
    read_features(net.geometry, state, scratch.present, here);
    if (net.embedding_dim > 0) here[net.geometry.count] = batch.moments[row];
  }
}

// Whether each point is present, and one row of numbers up to whole vectors.
std::size_t feature_scratch(const ContextNet& net) {
  const int most = net.own.count > net.geometry.count ? net.own.count : net.geometry.count;
  return static_cast<std::size_t>(llmdpd::padded(net.points.count, kWidth) + llmdpd::padded(most, kWidth));
}

void feature_rows(const ContextNet& net, const float* observations, std::ptrdiff_t rows, float* own, float* geometry,
                  float* scratch) {
  float *present = scratch, *numbers = scratch + llmdpd::padded(net.points.count, kWidth);
  clear(numbers, static_cast<std::ptrdiff_t>(feature_scratch(net)) - (numbers - scratch));
  for (std::ptrdiff_t r = 0; r < rows; ++r) {
    const float* state = observations + r * net.state_dim;
    find_present(net.points, state, present);
    read_features(net.own, state, present, numbers);
    __builtin_memcpy(own + r * net.own.count, numbers, net.own.count * sizeof(float));
    read_features(net.geometry, state, present, numbers);
    __builtin_memcpy(geometry + r * net.geometry.count, numbers, net.geometry.count * sizeof(float));
  }
}

int find_groups(const ContextBatch& batch, std::ptrdiff_t first_row, int rows, Group* groups) {
  int count = 0;
  for (int first = 0; first < rows;) {
    const ContextPrompt* prompt = batch.prompt(first_row + first);
    int next = first + 1;
    while (next < rows && batch.prompt(first_row + next) == prompt) ++next;
    groups[count++] = {prompt, first, next - first};
    first = next;
  }
  return count;
}

std::size_t context_scratch(const ContextNet& net, int most_steps_padded) {
  float origin[1];
  return static_cast<std::size_t>(ContextScratch(net, most_steps_padded, origin).floats);
}

void context_rows(const ContextNet& net, const ContextBatch& batch, std::ptrdiff_t first_row, int rows,
                  int most_steps_padded, float* memory) {
  const ContextScratch scratch(net, most_steps_padded, memory);
  read_states(net, batch, first_row, rows, scratch);
  if (net.width == 0) return;
  Group groups[kMaxBlock];
  const int count = find_groups(batch, first_row, rows, groups), streams = net.own.count + net.embedding_dim;
  float* out = batch.out + first_row * net.output_dim;
  for (int g = 0; g < count; ++g) {
    const Group& group = groups[g];
    apply(net.query, {out + group.first * net.output_dim, net.output_dim}, {group.prompt->query_init, 0},
          {scratch.hidden + group.first * scratch.hidden_stride, scratch.hidden_stride}, group.rows);
  }
  for (int layer = 0; layer < net.layers; ++layer) {
    attend(net, net.attention[layer], layer, groups, count, rows, scratch);
  }
  int column = streams;
  if (net.norm.weight) {
    normalise(net.norm, net.width, scratch.hidden, scratch.normed, scratch.hidden_stride, rows);
    for (int r = 0; r < rows; ++r) {
      __builtin_memcpy(out + r * net.output_dim + column, scratch.normed + r * scratch.hidden_stride,
                       net.width * sizeof(float));
    }
    column += net.width;
  }
  if (!net.waypoint_query.packed_tiles) return;
  apply(net.waypoint_query, {scratch.hidden, scratch.hidden_stride}, {net.waypoint_query.bias, 0},
        {scratch.query, scratch.hidden_stride}, rows);
  for (int g = 0; g < count; ++g) retrieve(net, groups[g], scratch, out + column, net.output_dim);
}

}  // namespace
