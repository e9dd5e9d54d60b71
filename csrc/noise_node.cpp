#include "noise_node.h"

#include <algorithm>
#include <cmath>

namespace llmdpd {

NoiseNode::NoiseNode(const NoisyActions& noisy, const std::vector<Weight>& given, const LayerTools& tools,
                     const TileKernels& trunk)
    : noisy_(noisy), tools_(tools), trunk_(trunk) {
  WeightsInOrder order(given);
  state_ = order.plain(static_cast<int>(noisy.rows), -1, "state");
  prompt_ = order.plain(-1, -1, "prompt");
  time_first_ = order.linear(-1, noisy.time_dim, "time embedding");
  time_second_ = order.linear(noisy.time_dim, time_first_.outputs(), "time embedding");
  first_ = order.linear(-1, own_dim() + prompt_.columns, "first layer");
  for (int i = 0; i < 2; ++i) layers_.push_back(order.linear(first_.outputs(), first_.outputs(), "hidden layer"));
  layers_.push_back(order.linear(-1, first_.outputs(), "output"));
  order.end();
  numbers_ = order.numbers();
  if (noisy.rows % prompt_.rows != 0) throw std::invalid_argument("wrong number: prompts");
  for (std::ptrdiff_t r = 0; r < noisy.rows; ++r) {
    if (noisy.place[r] < 0 || noisy.place[r] >= noisy.levels) throw std::invalid_argument("not a diffusion step");
  }
}

struct NoiseNode::Kept {
  LinearPass time_first, time_second, prompt;
  float *time_hidden, *bent, *time_active, *time_rows;  // before Mish, tanh(ln(1 + e^x)), Mish, the embedding
  float *x, *init;                                      // [B, A + T + S], [P, H]
};

void NoiseNode::plan(Allocator& tape, Kept& kept) const {
  const int levels = noisy_.levels, hidden = time_first_.outputs(), own = own_dim();
  kept.time_first.plan(noisy_.waves, levels, noisy_.time_dim, nullptr, {time_first_.layer}, tools_, tape);
  for (float** part : {&kept.time_hidden, &kept.bent, &kept.time_active}) {
    *part = tape.take(static_cast<std::size_t>(levels) * hidden);
  }
  kept.time_second.plan(kept.time_active, levels, hidden, nullptr, {time_second_.layer}, tools_, tape);
  kept.time_rows = tape.take(static_cast<std::size_t>(levels) * noisy_.time_dim);
  kept.x = tape.take(noisy_.rows * own);
  const Matrix& weight = first_.layer.weight;
  const Linear of_prompt{{weight.data + own, weight.stride, weight.outputs, prompt_.columns}, first_.layer.bias};
  kept.prompt.plan(prompt_.data, prompt_.rows, prompt_.columns, nullptr, {of_prompt}, tools_, tape);
  kept.init = tape.take(static_cast<std::size_t>(prompt_.rows) * first_.outputs());
}

std::size_t NoiseNode::tape_floats() const {
  Allocator count(nullptr);
  Kept kept{};
  plan(count, kept);
  return count.used();
}

std::size_t NoiseNode::hidden_tape_floats() const { return mlp_tape_floats(call({}), trunk_); }

MlpCall NoiseNode::call(const Kept& kept) const {
  const Matrix& weight = first_.layer.weight;
  const auto bias = [&](int layer) { return layers_[layer].layer.bias; };
  const auto data = [&](int layer) { return layers_[layer].layer.weight.data; };
  MlpCall call{};
  call.trunk = {first_.outputs(), outputs(), data(0), bias(0), data(1), bias(1), data(2), bias(2)};
  call.input_weight = {weight.data, weight.stride, weight.outputs, own_dim()};
  call.init = kept.init;
  call.init_per_row = true;
  call.init_share = static_cast<int>(noisy_.rows / prompt_.rows);
  call.rows = noisy_.rows;
  call.x = kept.x;
  call.x_stride = own_dim();
  return call;
}

void NoiseNode::forward(float* tape, float* hidden_tape, float* out) {
  Allocator memory(tape);
  Kept kept{};
  plan(memory, kept);
  kept.time_first.forward({kept.time_hidden}, tools_);
  for (int i = 0; i < noisy_.levels * time_first_.outputs(); ++i) {
    const float h = kept.time_hidden[i];
    kept.bent[i] = std::tanh(std::max(h, 0.0f) + std::log1p(std::exp(-std::abs(h))));
    kept.time_active[i] = h * kept.bent[i];
  }
  kept.time_second.forward({kept.time_rows}, tools_);
  const int actions = noisy_.action_dim, time = noisy_.time_dim, states = state_.columns;
  for_rows(noisy_.rows, tools_, [&](std::ptrdiff_t first, std::ptrdiff_t last) {
    for (std::ptrdiff_t r = first; r < last; ++r) {
      float* to = kept.x + r * own_dim();
      std::copy_n(noisy_.actions + r * actions, actions, to);
      std::copy_n(kept.time_rows + noisy_.place[r] * time, time, to + actions);
      std::copy_n(state_.data + r * states, states, to + actions + time);
    }
  });
  kept.prompt.forward({kept.init}, tools_);
  mlp_forward(call(kept), trunk_, tools_.threads, out, hidden_tape);
}

void NoiseNode::backward(float* tape, const float* hidden_tape, const float* d_out, float* gradients) {
  thread_local Arena arena;
  Allocator memory(tape);
  Kept kept{};
  plan(memory, kept);
  const int hidden = first_.outputs(), own = own_dim(), prompts = prompt_.rows, prompt_dim = prompt_.columns;
  const std::ptrdiff_t rows = noisy_.rows, each = rows / prompts;
  float *d_x = nullptr, *d_weight = nullptr, *d_init = nullptr, *d_prompt = nullptr, *d_prompt_weight = nullptr;
  lay_out(arena, [&](Allocator& parts) {
    d_x = parts.take(rows * own);
    d_weight = parts.take(static_cast<std::size_t>(hidden) * own);
    d_init = parts.take(rows * hidden);
    d_prompt = parts.take(static_cast<std::size_t>(prompts) * hidden);
    d_prompt_weight = parts.take(static_cast<std::size_t>(hidden) * prompt_dim);
  });
  GradientTargets targets{};
  targets.weights = true;
  const LinearTarget second = layers_[0].target(gradients), third = layers_[1].target(gradients);
  const LinearTarget output = layers_[2].target(gradients), first = first_.target(gradients);
  targets.w2 = second.weight, targets.b2 = second.bias, targets.w3 = third.weight, targets.b3 = third.bias;
  targets.w4 = output.weight, targets.b4 = output.bias;
  targets.input_weight = d_weight, targets.x = d_x, targets.init = d_init, targets.init_per_state = true;
  mlp_backward(call(kept), trunk_, tools_.threads, d_out, hidden_tape, targets);
  parallel_for(prompts, tools_.threads, [&](int p) {
    float* sum = d_prompt + static_cast<std::ptrdiff_t>(p) * hidden;
    std::fill_n(sum, hidden, 0.0f);
    for (std::ptrdiff_t r = p * each; r < (p + 1) * each; ++r) {
      for (int h = 0; h < hidden; ++h) sum[h] += d_init[r * hidden + h];
    }
  });
  kept.prompt.backward({d_prompt}, gradients + prompt_.at, {}, {{d_prompt_weight, first.bias}}, tools_);
  copy_columns({d_weight, own}, {first.weight, first_.inputs()}, hidden, own, tools_);
  copy_columns({d_prompt_weight, prompt_dim}, {first.weight + own, first_.inputs()}, hidden, prompt_dim, tools_);
  copy_columns({d_x + own - state_.columns, own}, {gradients + state_.at, state_.columns}, rows, state_.columns,
               tools_);
  backward_time(kept, d_x, gradients);
}

void NoiseNode::backward_time(Kept& kept, const float* d_x, float* gradients) const {
  thread_local Arena arena;
  const int levels = noisy_.levels, time = noisy_.time_dim, hidden = time_first_.outputs();
  float *d_rows = nullptr, *d_hidden = nullptr;
  lay_out(arena, [&](Allocator& parts) {
    d_rows = parts.take(static_cast<std::size_t>(levels) * time);
    d_hidden = parts.take(static_cast<std::size_t>(levels) * hidden);
  });
  std::fill_n(d_rows, static_cast<std::ptrdiff_t>(levels) * time, 0.0f);
  for (std::ptrdiff_t r = 0; r < noisy_.rows; ++r) {
    const float* from = d_x + r * own_dim() + noisy_.action_dim;
    for (int t = 0; t < time; ++t) d_rows[noisy_.place[r] * time + t] += from[t];
  }
  kept.time_second.backward({d_rows}, d_hidden, {}, {time_second_.target(gradients)}, tools_);
  for (int i = 0; i < levels * hidden; ++i) {
    const float h = kept.time_hidden[i], bent = kept.bent[i];
    const float share = h < 0.0f ? std::exp(h) / (1.0f + std::exp(h)) : 1.0f / (1.0f + std::exp(-h));
    d_hidden[i] *= bent + h * (1.0f - bent * bent) * share;
  }
  kept.time_first.backward({d_hidden}, nullptr, {}, {time_first_.target(gradients)}, tools_);
}

}  // namespace llmdpd
