#include "noise_weights.h"

#include <algorithm>
#include <cmath>

namespace llmdpd {

NoiseWeights::NoiseWeights(const std::vector<Weight>& given, bool prompted, std::ptrdiff_t rows, int action_dim,
                           int time_dim)
    : action_dim(action_dim), time_dim(time_dim) {
  WeightsInOrder order(given);
  state = order.plain(static_cast<int>(rows), -1, "state");
  if (prompted) prompt = order.plain(-1, -1, "prompt");
  time_first = order.linear(-1, time_dim, "time embedding");
  time_second = order.linear(time_dim, time_first.outputs(), "time embedding");
  first = order.linear(-1, own_dim() + prompt.columns, "first layer");
  for (int i = 0; i < 2; ++i) layers.push_back(order.linear(hidden(), hidden(), "hidden layer"));
  layers.push_back(order.linear(action_dim, hidden(), "output"));
  order.end();
  numbers = order.numbers();
  if (prompted && rows % prompt.rows != 0) throw std::invalid_argument("wrong number: prompts");
}

TrunkWeights NoiseWeights::trunk() const {
  const auto bias = [&](int layer) { return layers[layer].layer.bias; };
  const auto data = [&](int layer) { return layers[layer].layer.weight.data; };
  return {hidden(), layers[2].outputs(), data(0), bias(0), data(1), bias(1), data(2), bias(2)};
}

void NoiseWeights::add_targets(float* gradients, GradientTargets& targets) const {
  const LinearTarget second = layers[0].target(gradients), third = layers[1].target(gradients);
  const LinearTarget output = layers[2].target(gradients);
  targets.weights = true;
  targets.w2 = second.weight, targets.b2 = second.bias, targets.w3 = third.weight, targets.b3 = third.bias;
  targets.w4 = output.weight, targets.b4 = output.bias;
}

void NoiseWeights::write_columns(const float* from, int begin, int count, float* gradients,
                                 const LayerTools& tools) const {
  copy_columns({from, count}, {first.target(gradients).weight + begin, first.inputs()}, hidden(), count, tools);
}

void TimePass::plan(const float* waves, int levels, const NoiseWeights& weights, const LayerTools& tools,
                    Allocator& tape) {
  levels_ = levels, first_weights_ = weights.time_first, second_weights_ = weights.time_second;
  const int hidden = first_weights_.outputs();
  first_.plan(waves, levels, weights.time_dim, nullptr, {first_weights_.layer}, tools, tape);
  for (float** part : {&hidden_, &bent_, &active_}) *part = tape.take(static_cast<std::size_t>(levels) * hidden);
  second_.plan(active_, levels, hidden, nullptr, {second_weights_.layer}, tools, tape);
  rows_ = tape.take(static_cast<std::size_t>(levels) * weights.time_dim);
}

const float* TimePass::forward(const LayerTools& tools) {
  first_.forward({hidden_}, tools);
  for (int i = 0; i < levels_ * first_weights_.outputs(); ++i) {
    const float h = hidden_[i];
    bent_[i] = std::tanh(std::max(h, 0.0f) + std::log1p(std::exp(-std::abs(h))));
    active_[i] = h * bent_[i];
  }
  second_.forward({rows_}, tools);
  return rows_;
}

void TimePass::backward(const float* d_rows, float* gradients, const LayerTools& tools) const {
  thread_local Arena arena;
  const int numbers = levels_ * first_weights_.outputs();
  float* d_hidden = arena.reserve(numbers);
  second_.backward({d_rows}, d_hidden, {}, {second_weights_.target(gradients)}, tools);
  for (int i = 0; i < numbers; ++i) {
    const float h = hidden_[i], bent = bent_[i];
    const float share = h < 0.0f ? std::exp(h) / (1.0f + std::exp(h)) : 1.0f / (1.0f + std::exp(-h));
    d_hidden[i] *= bent + h * (1.0f - bent * bent) * share;
  }
  first_.backward({d_hidden}, nullptr, {}, {first_weights_.target(gradients)}, tools);
}

void PromptPass::plan(const NoiseWeights& weights, const LayerTools& tools, Allocator& tape) {
  weights_ = &weights;
  const PlainWeights& prompt = weights.prompt;
  if (!prompt.columns) return;
  const Linear layer{weights.columns(weights.own_dim(), prompt.columns), weights.first.layer.bias};
  pass_.plan(prompt.data, prompt.rows, prompt.columns, nullptr, {layer}, tools, tape);
  init_ = tape.take(static_cast<std::size_t>(prompt.rows) * weights.hidden());
}

const float* PromptPass::forward(const LayerTools& tools) {
  if (init_) pass_.forward({init_}, tools);
  return kept();
}

void PromptPass::backward(const float* d_out, float* gradients, const LayerTools& tools) const {
  thread_local Arena arena;
  const PlainWeights& prompt = weights_->prompt;
  float* d_bias = weights_->first.target(gradients).bias;
  if (!prompt.columns) {
    std::copy_n(d_out, weights_->hidden(), d_bias);
    return;
  }
  float* d_weight = arena.reserve(static_cast<std::size_t>(weights_->hidden()) * prompt.columns);
  pass_.backward({d_out}, gradients + prompt.at, {}, {{d_weight, d_bias}}, tools);
  weights_->write_columns(d_weight, weights_->own_dim(), prompt.columns, gradients, tools);
}

}  // namespace llmdpd
