#include "noise_node.h"

#include <algorithm>

namespace llmdpd {

NoiseNode::NoiseNode(const NoisyActions& noisy, const std::vector<Weight>& given, const LayerTools& tools,
                     const TileKernels& trunk, bool prompted)
    : noisy_(noisy),
      tools_(tools),
      trunk_(trunk),
      weights_(given, prompted, noisy.rows, noisy.action_dim, noisy.time_dim) {
  for (std::ptrdiff_t r = 0; r < noisy.rows; ++r) {
    if (noisy.place[r] < 0 || noisy.place[r] >= noisy.levels) throw std::invalid_argument("not a diffusion step");
  }
}

struct NoiseNode::Kept {
  TimePass time;
  PromptPass prompt;
  float* x;           // [B, A + T + S]
  const float* init;  // [P, H], or [H]
};

void NoiseNode::plan(Allocator& tape, Kept& kept) const {
  kept.time.plan(noisy_.waves, noisy_.levels, weights_, tools_, tape);
  kept.x = tape.take(noisy_.rows * weights_.own_dim());
  kept.prompt.plan(weights_, tools_, tape);
}

std::size_t NoiseNode::tape_floats() const {
  Allocator count(nullptr);
  Kept kept{};
  plan(count, kept);
  return count.used();
}

std::size_t NoiseNode::hidden_tape_floats() const { return mlp_tape_floats(call({}), trunk_); }

MlpCall NoiseNode::call(const Kept& kept) const {
  MlpCall call{};
  call.trunk = weights_.trunk();
  call.input_weight = weights_.columns(0, weights_.own_dim());
  call.init = kept.init;
  call.init_per_row = weights_.prompt.columns > 0;
  call.init_share = call.init_per_row ? static_cast<int>(noisy_.rows / weights_.prompt.rows) : 1;
  call.rows = noisy_.rows;
  call.x = kept.x;
  call.x_stride = weights_.own_dim();
  return call;
}

void NoiseNode::forward(float* tape, float* hidden_tape, float* out) {
  Allocator memory(tape);
  Kept kept{};
  plan(memory, kept);
  const float* time_rows = kept.time.forward(tools_);
  const PlainWeights& state = weights_.state;
  const int actions = noisy_.action_dim, time = noisy_.time_dim, states = state.columns;
  for_rows(noisy_.rows, tools_, [&](std::ptrdiff_t first, std::ptrdiff_t last) {
    for (std::ptrdiff_t r = first; r < last; ++r) {
      float* to = kept.x + r * weights_.own_dim();
      std::copy_n(noisy_.actions + r * actions, actions, to);
      std::copy_n(time_rows + noisy_.place[r] * time, time, to + actions);
      std::copy_n(state.data + r * states, states, to + actions + time);
    }
  });
  kept.init = kept.prompt.forward(tools_);
  mlp_forward(call(kept), trunk_, tools_.threads, out, hidden_tape);
}

void NoiseNode::backward(float* tape, const float* hidden_tape, const float* d_out, float* gradients) {
  thread_local Arena arena;
  Allocator memory(tape);
  Kept kept{};
  plan(memory, kept);
  kept.init = kept.prompt.kept();
  const PlainWeights& state = weights_.state;
  const int hidden = weights_.hidden(), own = weights_.own_dim(), prompts = weights_.prompt.rows;
  const std::ptrdiff_t rows = noisy_.rows, each = prompts ? rows / prompts : rows;
  float *d_x = nullptr, *d_weight = nullptr, *d_init = nullptr, *d_prompt = nullptr;
  lay_out(arena, [&](Allocator& parts) {
    d_x = parts.take(rows * own);
    d_weight = parts.take(static_cast<std::size_t>(hidden) * own);
    d_init = parts.take(prompts ? rows * hidden : 0);
    d_prompt = parts.take(static_cast<std::size_t>(std::max(prompts, 1)) * hidden);
  });
  GradientTargets targets{};
  weights_.add_targets(gradients, targets);
  targets.input_weight = d_weight, targets.x = d_x;
  targets.init = prompts ? d_init : d_prompt, targets.init_per_state = prompts > 0;
  mlp_backward(call(kept), trunk_, tools_.threads, d_out, hidden_tape, targets);
  parallel_for(prompts, tools_.threads, [&](int p) {
    float* sum = d_prompt + static_cast<std::ptrdiff_t>(p) * hidden;
    std::fill_n(sum, hidden, 0.0f);
    for (std::ptrdiff_t r = p * each; r < (p + 1) * each; ++r) {
      for (int h = 0; h < hidden; ++h) sum[h] += d_init[r * hidden + h];
    }
  });
  kept.prompt.backward(d_prompt, gradients, tools_);
  weights_.write_columns(d_weight, 0, own, gradients, tools_);
  copy_columns({d_x + own - state.columns, own}, {gradients + state.at, state.columns}, rows, state.columns, tools_);
  backward_time(kept, d_x, gradients);
}

void NoiseNode::backward_time(const Kept& kept, const float* d_x, float* gradients) const {
  thread_local Arena arena;
  const int time = noisy_.time_dim;
  const std::ptrdiff_t numbers = static_cast<std::ptrdiff_t>(noisy_.levels) * time;
  float* d_rows = arena.reserve(numbers);
  std::fill_n(d_rows, numbers, 0.0f);
  for (std::ptrdiff_t r = 0; r < noisy_.rows; ++r) {
    const float* from = d_x + r * weights_.own_dim() + noisy_.action_dim;
    for (int t = 0; t < time; ++t) d_rows[noisy_.place[r] * time + t] += from[t];
  }
  kept.time.backward(d_rows, gradients, tools_);
}

}  // namespace llmdpd
