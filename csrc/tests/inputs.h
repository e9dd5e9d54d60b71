// Random networks, sizes and schedules for the tests.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "../dispatch.h"
#include "../reverse_diffusion.h"
#include "../sampler.h"

namespace inputs {

using Floats = std::vector<float>;
using Random = std::mt19937;
// A call with everything but the number of threads settled; returns all that it wrote.
using Call = std::function<Floats(int threads)>;

inline Floats normals(Random& random, std::size_t count, float scale = 1.0f) {
  std::normal_distribution<float> normal(0.0f, scale);
  Floats out(count);
  for (float& x : out) x = normal(random);
  return out;
}

inline const llmdpd::TileKernels& kernels(Random& random) { return llmdpd::active_kernels(random() % 2 == 0); }

inline int between(Random& random, int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); }

struct Weights {
  Floats w2, b2, w3, b3, w4, b4, first, first_bias;
  llmdpd::TrunkWeights trunk;

  Weights(Random& random, int hidden, int inputs, int outputs)
      : w2(normals(random, std::size_t(hidden) * hidden, 0.2f)),
        b2(normals(random, hidden)),
        w3(normals(random, std::size_t(hidden) * hidden, 0.2f)),
        b3(normals(random, hidden)),
        w4(normals(random, std::size_t(outputs) * hidden, 0.2f)),
        b4(normals(random, outputs)),
        first(normals(random, std::size_t(hidden) * inputs, 0.3f)),
        first_bias(normals(random, hidden)),
        trunk{hidden, outputs, w2.data(), b2.data(), w3.data(), b3.data(), w4.data(), b4.data()} {}
};

struct Sizes {
  int states, samples, steps, state, action, prompt, hidden;
  explicit Sizes(Random& random)
      : states(between(random, 1, 60)),
        samples(between(random, 1, 5)),
        steps(between(random, 1, 6)),
        state(between(random, 0, 20)),
        action(between(random, 1, 9)),
        prompt(between(random, 0, 12)),
        hidden(between(random, 1, 80)) {}
  std::size_t rows() const { return std::size_t(states) * samples; }
};

struct Schedule {
  Floats table;
  std::vector<std::uint64_t> keys;
  llmdpd::Schedule schedule;
  llmdpd::Noise noise;

  Schedule(Random& random, const Sizes& sizes) : table(normals(random, std::size_t(sizes.steps) * 6, 0.5f)) {
    const bool own_keys = between(random, 0, 1);
    for (int i = 0; i < (own_keys ? sizes.states : 1); ++i) keys.push_back(random());
    schedule = {sizes.steps, reinterpret_cast<const llmdpd::StepCoefficients*>(table.data()), 1.0f,
                between(random, 0, 1) ? 1.0f : std::numeric_limits<float>::infinity()};
    noise = {nullptr, keys.data(), own_keys};
  }
};

// One action each of states in the context of several prompts, by weights that are packed once.
Call make_acting(Random& random);
// Features of observations by a context.
Call make_features(Random& random);
// Layers forward and backward; steps and averages of an optimiser.
Call make_linear(Random& random);
Call make_attention(Random& random);
Call make_optimizer(Random& random);
// Prompts and states read, noise predicted, actions sampled, forward and backward (node_test.cpp).
Call make_prompt_reading(Random& random);
Call make_state_reading(Random& random);
Call make_noise_node(Random& random);
Call make_chain_node(Random& random);

}  // namespace inputs
