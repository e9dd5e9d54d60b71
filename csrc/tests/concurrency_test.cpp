// Every entry point called from several threads at once, each call with several threads of the pool: the same bits as
// one call alone.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../dispatch.h"
#include "../reverse_diffusion.h"
#include "check.h"

namespace {

using Floats = std::vector<float>;
using Random = std::mt19937;
// A call with everything but the number of threads settled; returns all that it wrote.
using Call = std::function<Floats(int threads)>;

Floats normals(Random& random, std::size_t count, float scale = 1.0f) {
  std::normal_distribution<float> draw(0.0f, scale);
  Floats out(count);
  for (float& x : out) x = draw(random);
  return out;
}

int between(Random& random, int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); }

struct SamplerInputs {
  llmdpd::Net net{};
  llmdpd::Chain chain{};
  llmdpd::Batch batch{};
  Floats weights[4], biases[4], embedding, table, state, prompt;
  std::vector<std::uint64_t> keys;
};

Call make_reverse_diffusion(Random& random) {
  auto in = std::make_shared<SamplerInputs>();
  llmdpd::Net& net = in->net;
  net.action_dim = between(random, 1, 9), net.time_dim = 4, net.state_dim = between(random, 0, 20);
  net.prompt_dim = between(random, 0, 12), net.hidden_dim = between(random, 1, 80);
  const int inputs[4] = {net.action_dim + net.time_dim + net.state_dim + net.prompt_dim, net.hidden_dim, net.hidden_dim,
                         net.hidden_dim};
  for (int layer = 0; layer < 4; ++layer) {
    const int outputs = layer < 3 ? net.hidden_dim : net.action_dim;
    in->weights[layer] = normals(random, std::size_t(outputs) * inputs[layer], 0.3f);
    in->biases[layer] = normals(random, outputs);
    net.weight[layer] = in->weights[layer].data();
    net.bias[layer] = in->biases[layer].data();
  }
  const int steps = between(random, 1, 6), states = between(random, 1, 60), samples = between(random, 1, 5);
  in->embedding = normals(random, std::size_t(steps) * net.time_dim);
  in->table = normals(random, std::size_t(steps) * 6, 0.5f);
  in->chain = {steps, in->embedding.data(), reinterpret_cast<const llmdpd::StepCoefficients*>(in->table.data()), 1.0f,
               between(random, 0, 1) ? 1.0f : std::numeric_limits<float>::infinity()};
  const bool own_prompts = between(random, 0, 1), own_keys = between(random, 0, 1);
  in->state = normals(random, std::size_t(states) * net.state_dim);
  in->prompt = normals(random, std::size_t(own_prompts ? states : 1) * net.prompt_dim);
  for (int i = 0; i < (own_keys ? states : 1); ++i) in->keys.push_back(random());
  in->batch = {states,  samples, in->state.data(), in->prompt.data(), own_prompts, nullptr, in->keys.data(),
               own_keys};
  return [in, rows = std::size_t(states) * samples](int threads) {
    Floats actions(rows * in->net.action_dim);
    llmdpd::reverse_diffusion(in->net, in->chain, in->batch, llmdpd::active_kernels(), threads, actions.data());
    return actions;
  };
}

// A new entry point is a line here.
constexpr Call (*kEntryPoints[])(Random&) = {make_reverse_diffusion};

bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace

void test_concurrent_calls() {
  const unsigned seed = std::random_device{}();
  std::printf("concurrent calls: seed %u\n", seed);
  Random random(seed);
  for (const std::string& isa : llmdpd::runnable_isas()) {
    llmdpd::set_isa(isa);
    std::vector<Call> calls;
    std::vector<Floats> expected;
    for (int i = 0; i < 8; ++i) {
      for (const auto make : kEntryPoints) {
        calls.push_back(make(random));
        expected.push_back(calls.back()(1));
        CHECK(same_bits(calls.back()(5), expected.back()));
      }
    }
    std::vector<std::thread> callers;
    for (unsigned caller = 0; caller < 4; ++caller) {
      callers.emplace_back([&, caller] {
        for (std::size_t i = 0; i < 6 * calls.size(); ++i) {
          const std::size_t which = (i * (2 * caller + 1) + caller) % calls.size();
          CHECK(same_bits(calls[which](1 + (i + caller) % 4), expected[which]));
        }
      });
    }
    for (std::thread& caller : callers) caller.join();
  }
}
