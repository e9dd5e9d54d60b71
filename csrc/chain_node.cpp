#include "chain_node.h"

#include <algorithm>

namespace llmdpd {

ChainNode::ChainNode(const ChainShown& shown, const std::vector<Weight>& given, const LayerTools& tools,
                     const TileKernels& trunk, bool prompted)
    : shown_(shown),
      tools_(tools),
      trunk_(trunk),
      weights_(given, prompted, shown.states, shown.action_dim, shown.time_dim) {
  const int prompts = weights_.prompt.rows;
  if (prompts > 1 && prompts != shown.states) throw std::invalid_argument("wrong number: prompts");
}

struct ChainNode::Kept {
  TimePass time;
  PromptPass prompt;
  LinearPass tau_pass;
  float *no_bias, *tau;  // [H], [K, H]
  const float* u_z;      // [H], or [B, H]
};

void ChainNode::plan(Allocator& tape, Kept& kept) const {
  const int hidden = weights_.hidden(), steps = shown_.schedule.steps;
  kept.time.plan(shown_.waves, steps, weights_, tools_, tape);
  kept.no_bias = tape.take(hidden);
  kept.tau_pass.plan(kept.time.kept(), steps, shown_.time_dim, nullptr,
                     {{weights_.columns(shown_.action_dim, shown_.time_dim), kept.no_bias}}, tools_, tape);
  kept.tau = tape.take(static_cast<std::size_t>(steps) * hidden);
  kept.prompt.plan(weights_, tools_, tape);
}

std::size_t ChainNode::tape_floats() const {
  Allocator count(nullptr);
  Kept kept{};
  plan(count, kept);
  return count.used();
}

std::size_t ChainNode::steps_tape_floats() const { return chain_tape_floats(call({}), trunk_); }

ChainCall ChainNode::call(const Kept& kept) const {
  ChainCall call{};
  call.trunk = weights_.trunk();
  call.W_a = weights_.columns(0, shown_.action_dim);
  call.W_s = weights_.columns(shown_.action_dim + shown_.time_dim, weights_.state.columns);
  call.u_z = kept.u_z;
  call.u_z_per_state = weights_.prompt.rows > 1;
  call.tau = kept.tau;
  call.states = shown_.states;
  call.samples = shown_.samples;
  call.state = weights_.state.data;
  call.state_stride = weights_.state.columns;
  call.schedule = shown_.schedule;
  call.noise = shown_.noise;
  return call;
}

void ChainNode::forward(float* tape, float* steps_tape, float* actions) {
  Allocator memory(tape);
  Kept kept{};
  plan(memory, kept);
  kept.time.forward(tools_);
  std::fill_n(kept.no_bias, weights_.hidden(), 0.0f);
  kept.tau_pass.forward({kept.tau}, tools_);
  kept.u_z = kept.prompt.forward(tools_);
  chain_forward(call(kept), trunk_, tools_.threads, actions, steps_tape);
}

void ChainNode::backward(float* tape, const float* steps_tape, const float* d_actions, float* gradients) {
  thread_local Arena arena;
  Allocator memory(tape);
  Kept kept{};
  plan(memory, kept);
  kept.u_z = kept.prompt.kept();
  const int hidden = weights_.hidden(), actions = shown_.action_dim, time = shown_.time_dim;
  const int steps = shown_.schedule.steps, states = weights_.state.columns;
  const std::ptrdiff_t rows = std::max(weights_.prompt.rows, 1);
  GradientTargets targets{};
  float *d_W_t = nullptr, *d_no_bias = nullptr, *d_time = nullptr;
  lay_out(arena, [&](Allocator& parts) {
    targets.W_a = parts.take(static_cast<std::size_t>(hidden) * actions);
    targets.input_weight = parts.take(static_cast<std::size_t>(hidden) * states);
    targets.init = parts.take(rows * hidden);
    targets.tau = parts.take(static_cast<std::size_t>(steps) * hidden);
    d_W_t = parts.take(static_cast<std::size_t>(hidden) * time);
    d_no_bias = parts.take(hidden);
    d_time = parts.take(static_cast<std::size_t>(steps) * time);
  });
  weights_.add_targets(gradients, targets);
  targets.init_per_state = rows > 1;
  targets.x = shown_.need_state ? gradients + weights_.state.at : nullptr;
  chain_backward(call(kept), trunk_, tools_.threads, d_actions, steps_tape, targets);
  kept.tau_pass.backward({targets.tau}, d_time, {}, {{d_W_t, d_no_bias}}, tools_);
  kept.time.backward(d_time, gradients, tools_);
  kept.prompt.backward(targets.init, gradients, tools_);
  weights_.write_columns(targets.W_a, 0, actions, gradients, tools_);
  weights_.write_columns(d_W_t, actions, time, gradients, tools_);
  weights_.write_columns(targets.input_weight, actions + time, states, gradients, tools_);
}

}  // namespace llmdpd
