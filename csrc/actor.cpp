#include "actor.h"

#include <algorithm>
#include <cmath>

#include "mish_mlp.h"

namespace llmdpd {
namespace {

// The first layer's part that a state's samples share, [states, padded hidden].
void state_rows(const PackedCritic& critic, std::ptrdiff_t states, const float* state, const float* prompt,
                bool prompt_per_state, float* rows) {
  const std::ptrdiff_t width = critic.trunk.hidden_padded;
  const float* init = critic.bias;
  std::ptrdiff_t init_stride = 0;
  if (critic.prompt_dim > 0) {
    critic.kernels.dense(critic.prompt, prompt, prompt_per_state ? critic.prompt_dim : 0, init, 0, rows, width, states);
    init = rows;
    init_stride = width;
  }
  critic.kernels.dense(critic.state, state, critic.state_dim, init, init_stride, rows, width, states);
}

// A number in [0, 1] from a standard normal one.
double uniform_of(double normal) { return 0.5 * std::erfc(-normal * 0.70710678118654752440); }

// The sample that `uniform` falls on in the running sum of the softmax of the values, over its weights in `memory`.
int choose_softly(const float* values, int samples, double temperature, double uniform, double* memory) {
  double largest = values[0] / temperature, total = 0.0;
  for (int i = 1; i < samples; ++i) largest = std::max(largest, values[i] / temperature);
  for (int i = 0; i < samples; ++i) total += memory[i] = std::exp(values[i] / temperature - largest);
  double sum = 0.0;
  for (int i = 0; i < samples - 1; ++i) {
    sum += memory[i];
    if (!(sum < uniform * total)) return i;
  }
  return samples - 1;
}

}  // namespace

PackedCritic::PackedCritic(int state_size, int action_size, int prompt_size, const float* first_weight,
                           const float* first_bias, const TrunkWeights& weights, const TileKernels& tile_kernels)
    : state_dim(state_size), action_dim(action_size), prompt_dim(prompt_size), kernels(tile_kernels) {
  const int inputs = state_dim + action_dim + prompt_dim;
  lay_out(memory_, [&](Allocator& memory) {
    state = pack_single({first_weight, inputs, weights.hidden, state_dim}, false, kernels, memory);
    action = pack_single({first_weight + state_dim, inputs, weights.hidden, action_dim}, false, kernels, memory);
    prompt = pack_single({first_weight + state_dim + action_dim, inputs, weights.hidden, prompt_dim}, false, kernels,
                         memory);
    bias = copy_padded(first_bias, weights.hidden, kernels, memory);
    trunk = pack_trunk(weights, {true, false}, kernels, memory);
  });
}

Actor::Actor(std::shared_ptr<const Sampler> sampler, std::shared_ptr<const PackedCritic> q1,
             std::shared_ptr<const PackedCritic> q2, int samples, Selection selection)
    : sampler_(std::move(sampler)), critics_{std::move(q1), std::move(q2)}, samples_(samples), selection_(selection) {}

void Actor::act(std::ptrdiff_t states, const float* state, const float* prompt, bool prompt_per_state,
                const std::uint64_t* keys, int threads, float* actions) const {
  thread_local Arena arena;
  const NetDims& dims = sampler_->net().dims;
  const std::ptrdiff_t rows = states * samples_;
  float *sampled, *values[2], *u[2];
  double* weights;
  lay_out(arena, [&](Allocator& memory) {
    sampled = memory.take(rows * dims.action);
    for (int q = 0; q < 2; ++q) {
      values[q] = memory.take(rows);
      u[q] = memory.take(states * critics_[q]->trunk.hidden_padded);
    }
    weights = reinterpret_cast<double*>(memory.take(std::size_t{2} * samples_));
  });
  sampler_->run({states, samples_, state, prompt, prompt_per_state, {nullptr, keys, true}}, threads, sampled);
  for (int q = 0; q < 2; ++q) {
    const PackedCritic& critic = *critics_[q];
    state_rows(critic, states, state, prompt, prompt_per_state, u[q]);
    Mlp mlp{};
    mlp.trunk = critic.trunk;
    mlp.first.input = critic.action;
    mlp.first.x = sampled;
    mlp.first.x_stride = mlp.first.inputs = critic.action_dim;
    mlp.first.init = u[q];
    mlp.first.init_stride = critic.trunk.hidden_padded;
    mlp.first.init_share = samples_;
    mlp.rows = rows;
    mlp.out = values[q];
    run_mlp(mlp, critic.kernels, threads);
  }
  for (std::ptrdiff_t s = 0; s < states; ++s) {
    float* value = values[0] + s * samples_;
    for (int i = 0; i < samples_; ++i) value[i] = std::min(value[i], values[1][s * samples_ + i]);
    std::ptrdiff_t choice = std::max_element(value, value + samples_) - value;
    if (selection_.soft) {
      // Its normal number lies past the sampler's steps + 1.
      float normal;
      sampler_->net().kernels.normals({keys, true, 1, 1}, s, 1, sampler_->steps() + 1, 1, &normal);
      choice = choose_softly(value, samples_, selection_.temperature, uniform_of(normal), weights);
    }
    std::copy_n(sampled + (s * samples_ + choice) * dims.action, dims.action, actions + s * dims.action);
  }
}

}  // namespace llmdpd
