#include <algorithm>
#include <cmath>

#include "reading.h"

namespace llmdpd {

StateReading::StateReading(const ContextShape& shape, const StatesSeen& seen, const std::vector<Weight>& given,
                           const LayerTools& tools)
    : shape_(shape), seen_(seen), tools_(tools) {
  WeightsInOrder order(given);
  const int memory = seen.prompts * seen.steps;
  pooled_ = order.plain(seen.prompts, -1, "pooled");
  for (int i = 0; i < shape.layers; ++i) {
    Layer layer{};
    layer.key = order.plain(memory, -1, "key");
    layer.value = order.plain(memory, layer.key.columns, "value");
    layers_.push_back(layer);
  }
  if (shape.waypoints) waypoint_key_ = order.plain(memory, -1, "waypoint key");
  query_ = order.linear(-1, -1, "query");
  const int w = width();
  for (Layer& layer : layers_) {
    layer.query_norm = order.norm(w, "norm");
    layer.forward_norm = order.norm(w, "norm");
    layer.query = order.linear(w, w, "query");
    layer.out = order.linear(w, w, "output");
    layer.widen = order.linear(-1, w, "feed-forward");
    layer.narrow = order.linear(w, layer.widen.outputs(), "feed-forward");
    if (layer.key.columns != w) throw std::invalid_argument("wrong shape: key");
  }
  if (shape.layers) norm_ = order.norm(w, "norm");
  if (shape.waypoints) {
    waypoint_query_ = order.linear(w, w, "waypoint query");
    if (waypoint_key_.columns != w) throw std::invalid_argument("wrong shape: waypoint key");
  }
  if (shape.similarity) likeness_ = order.plain(shape.heads, seen.compared, "likeness");
  order.end();
  numbers_ = order.numbers();
  if (text_dim() < 0 || (shape.text ? text_dim() < 1 || text_dim() > pooled_.columns : text_dim() != 0)) {
    throw std::invalid_argument("wrong shape: query");
  }
  if (shape.heads < 1 || w % shape.heads != 0) throw std::invalid_argument("wrong number: heads");
}

int StateReading::found_dim() const {
  return shape_.waypoints ? shape_.heads * (2 * seen_.waypoint_dim - shape_.action_dim) : 0;
}

struct StateReading::Kept {
  LinearPass own, text, waypoint_query, norm;
  float* no_bias;  // of the states' part of the query, where the text's has it
  float *pooled_text, *init;
  std::vector<float*> hidden;  // [B, W]: before each layer, and after the last
  std::vector<AttentionPass> layers;
  float *normed, *query, *found, *similarity, *retrieved;
};

void StateReading::plan(Allocator& tape, Kept& kept) const {
  const int w = width(), prompts = seen_.prompts, own = seen_.own_dim, text = text_dim();
  const Matrix& all = query_.layer.weight;
  kept.no_bias = tape.take(w);
  const Linear of_states{{all.data, all.stride, w, own}, shape_.text ? kept.no_bias : query_.layer.bias};
  kept.own.plan(seen_.own, states(), own, nullptr, {of_states}, tools_, tape);
  if (shape_.text) {
    kept.pooled_text = tape.take(static_cast<std::size_t>(prompts) * text);
    kept.init = tape.take(static_cast<std::size_t>(prompts) * w);
    const Linear of_text{{all.data + own, all.stride, w, text}, query_.layer.bias};
    kept.text.plan(kept.pooled_text, prompts, text, nullptr, {of_text}, tools_, tape);
  }
  kept.hidden.assign(layers_.size() + 1, nullptr);
  for (float*& hidden : kept.hidden) hidden = tape.take(states() * w);
  kept.layers.resize(layers_.size());
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    const Layer& layer = layers_[i];
    kept.layers[i].plan({prompts, seen_.rows, seen_.steps, w, layer.widen.outputs(), shape_.heads, kept.hidden[i],
                         layer.key.data, layer.value.data, seen_.bias, layer.query_norm.norm, layer.forward_norm.norm,
                         layer.query.layer, layer.out.layer, layer.widen.layer, layer.narrow.layer},
                        tools_, tape);
  }
  if (!layers_.empty()) {
    kept.norm.plan(kept.hidden.back(), states(), w, &norm_, {}, tools_, tape);
    kept.normed = tape.take(states() * w);
  }
  if (shape_.waypoints) {
    kept.waypoint_query.plan(kept.hidden.back(), states(), w, nullptr, {waypoint_query_.layer}, tools_, tape);
    kept.query = tape.take(states() * w);
    kept.found = tape.take(states() * found_dim());
    kept.similarity = tape.take(static_cast<std::size_t>(shape_.heads) * seen_.compared);
    kept.retrieved = tape.take(retrieval_tape_floats(retrieval(kept), tools_));
  }
}

RetrievalCall StateReading::retrieval(const Kept& kept) const {
  RetrievalCall call{};
  call.groups = seen_.prompts, call.rows = seen_.rows, call.steps = seen_.steps;
  call.width = width(), call.heads = shape_.heads;
  call.action_dim = shape_.action_dim, call.geometry = shape_.geometry, call.compared = seen_.compared;
  call.lookaheads = shape_.geometry > 0 ? (seen_.waypoint_dim - shape_.action_dim) / shape_.geometry : 0;
  call.query = kept.query, call.key = waypoint_key_.data, call.bias = seen_.waypoint_bias, call.here = seen_.here;
  call.there = shape_.similarity ? seen_.there : nullptr;
  call.similarity = shape_.similarity ? kept.similarity : nullptr;
  call.waypoints = seen_.waypoints, call.out = kept.found;
  return call;
}

std::size_t StateReading::tape_floats() const {
  Allocator count(nullptr);
  Kept kept{};
  plan(count, kept);
  return count.used();
}

void StateReading::forward(float* tape, float* condition) {
  Allocator memory(tape);
  Kept kept{};
  plan(memory, kept);
  const int w = width(), own = seen_.own_dim, all = condition_dim();
  std::fill_n(kept.no_bias, w, 0.0f);
  kept.own.forward({kept.hidden[0]}, tools_);
  if (shape_.text) {
    const LayerTools alone{tools_.tile, tools_.layers, 1};
    copy_columns({pooled_.data, pooled_.columns}, {kept.pooled_text, text_dim()}, seen_.prompts, text_dim(), alone);
    kept.text.forward({kept.init}, tools_);
    for_rows(states(), tools_, [&](std::ptrdiff_t first, std::ptrdiff_t last) {
      for (std::ptrdiff_t r = first; r < last; ++r) {
        const float* init = kept.init + r / seen_.rows * w;
        for (int c = 0; c < w; ++c) kept.hidden[0][r * w + c] += init[c];
      }
    });
  }
  for (std::size_t i = 0; i < layers_.size(); ++i) kept.layers[i].forward(kept.hidden[i + 1], tools_);
  copy_columns({seen_.own, own}, {condition, all}, states(), own, tools_);
  int end = own;
  if (!layers_.empty()) {
    kept.norm.forward({kept.normed}, tools_);
    copy_columns({kept.normed, w}, {condition + end, all}, states(), w, tools_);
    end += w;
  }
  if (shape_.waypoints) {
    for (int i = 0; shape_.similarity && i < shape_.heads * seen_.compared; ++i) {
      kept.similarity[i] = std::exp(likeness_.data[i]);
    }
    kept.waypoint_query.forward({kept.query}, tools_);
    retrieval_forward(retrieval(kept), kept.retrieved, tools_);
    copy_columns({kept.found, found_dim()}, {condition + end, all}, states(), found_dim(), tools_);
  }
}

void StateReading::backward(float* tape, const float* d_condition, float* gradients) {
  thread_local Arena arena;
  Allocator memory(tape);
  Kept kept{};
  plan(memory, kept);
  const int w = width(), all = condition_dim();
  float *d_hidden = nullptr, *part = nullptr, *d_found = nullptr, *d_query = nullptr, *d_similarity = nullptr;
  lay_out(arena, [&](Allocator& parts) {
    d_hidden = parts.take(states() * w);
    part = parts.take(states() * w);
    d_found = parts.take(states() * found_dim());
    d_query = parts.take(states() * w);
    d_similarity = parts.take(static_cast<std::size_t>(shape_.heads) * seen_.compared);
  });
  std::fill_n(d_hidden, states() * w, 0.0f);
  int end = seen_.own_dim;
  if (!layers_.empty()) {
    copy_columns({d_condition + end, all}, {part, w}, states(), w, tools_);
    kept.norm.backward({part}, d_hidden, norm_.target(gradients), {}, tools_);
    end += w;
  }
  if (shape_.waypoints) {
    copy_columns({d_condition + end, all}, {d_found, found_dim()}, states(), found_dim(), tools_);
    retrieval_backward(retrieval(kept), d_found, kept.retrieved, d_query, gradients + waypoint_key_.at, d_similarity,
                       tools_);
    for (int i = 0; shape_.similarity && i < shape_.heads * seen_.compared; ++i) {
      gradients[likeness_.at + i] = d_similarity[i] * kept.similarity[i];
    }
    kept.waypoint_query.backward({d_query}, part, {}, {waypoint_query_.target(gradients)}, tools_);
    add_columns({part, w}, {d_hidden, w}, states(), w, tools_);
  }
  for (std::size_t i = layers_.size(); i-- > 0;) {
    const Layer& layer = layers_[i];
    kept.layers[i].backward(d_hidden,
                            {part, gradients + layer.key.at, gradients + layer.value.at,
                             layer.query_norm.target(gradients), layer.forward_norm.target(gradients),
                             layer.query.target(gradients), layer.out.target(gradients),
                             layer.widen.target(gradients), layer.narrow.target(gradients)},
                            tools_);
    std::swap(d_hidden, part);
  }
  backward_query(kept, d_hidden, gradients);
}

void StateReading::backward_query(Kept& kept, const float* d_hidden, float* gradients) const {
  thread_local Arena arena;
  const int w = width(), own = seen_.own_dim, text = text_dim(), prompts = seen_.prompts;
  float *d_own = nullptr, *d_text = nullptr, *d_init = nullptr, *d_vector = nullptr, *unused = nullptr;
  lay_out(arena, [&](Allocator& parts) {
    d_own = parts.take(static_cast<std::size_t>(w) * own);
    d_text = parts.take(static_cast<std::size_t>(w) * text);
    d_init = parts.take(static_cast<std::size_t>(prompts) * w);
    d_vector = parts.take(static_cast<std::size_t>(prompts) * text);
    unused = parts.take(w);
  });
  const LinearTarget query = query_.target(gradients);
  const LayerTools alone{tools_.tile, tools_.layers, 1};
  kept.own.backward({d_hidden}, nullptr, {}, {{d_own, shape_.text ? unused : query.bias}}, tools_);
  copy_columns({d_own, own}, {query.weight, query_.inputs()}, w, own, alone);
  std::fill_n(gradients + pooled_.at, static_cast<std::ptrdiff_t>(prompts) * pooled_.columns, 0.0f);
  if (!shape_.text) return;
  parallel_for(prompts, tools_.threads, [&](int p) {
    float* sum = d_init + static_cast<std::ptrdiff_t>(p) * w;
    std::fill_n(sum, w, 0.0f);
    for (int r = 0; r < seen_.rows; ++r) {
      const float* from = d_hidden + (static_cast<std::ptrdiff_t>(p) * seen_.rows + r) * w;
      for (int c = 0; c < w; ++c) sum[c] += from[c];
    }
  });
  kept.text.backward({d_init}, d_vector, {}, {{d_text, query.bias}}, tools_);
  copy_columns({d_text, text}, {query.weight + own, query_.inputs()}, w, text, alone);
  copy_columns({d_vector, text}, {gradients + pooled_.at, pooled_.columns}, prompts, text, alone);
}

}  // namespace llmdpd
