// Acting in one call: nothing is taken from the heap once a call of the size has been made.
#include <atomic>
#include <cstdlib>
#include <list>
#include <memory>
#include <new>
#include <string>

#include "../context.h"
#include "check.h"
#include "inputs.h"

namespace {

std::atomic<long> allocations{0};

void* counted(std::size_t bytes, std::size_t alignment) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  void* memory = std::aligned_alloc(alignment, (bytes + alignment) / alignment * alignment);
  if (!memory) throw std::bad_alloc();
  return memory;
}

}  // namespace

void* operator new(std::size_t bytes) { return counted(bytes, alignof(std::max_align_t)); }
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return counted(bytes, static_cast<std::size_t>(alignment));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }

namespace inputs {
namespace {

// Weights live as long as what packs them.
class Store {
 public:
  explicit Store(Random& random) : random_(random) {}
  const float* make(std::size_t count, float scale = 0.3f) {
    return parts_.emplace_back(normals(random_, count, scale)).data();
  }
  llmdpd::Linear linear(int outputs, int inputs) {
    return {{make(std::size_t(outputs) * inputs), inputs, outputs, inputs}, make(outputs)};
  }
  llmdpd::Norm norm(int width) { return {make(width), make(width)}; }

 private:
  Random& random_;
  std::list<Floats> parts_;
};

llmdpd::ContextFeatures random_features(Random& random, int state_dim) {
  llmdpd::ContextFeatures features{};
  features.point_columns = {0, 1, state_dim - 1};
  features.point_ends = {2, 3};
  const auto column = [&] { return between(random, 0, state_dim - 1); };
  for (int i = between(random, 1, 40); i > 0; --i) {
    features.own.push_back({between(random, 0, 3), column(), column(), {between(random, -1, 1), -1}, 0.5f, 0.1f});
  }
  for (int i = between(random, 1, 20); i > 0; --i) {
    features.geometry.push_back({between(random, 0, 3), column(), column(), {-1, between(random, -1, 1)}, 0.5f, 0.1f});
  }
  if (between(random, 0, 1)) features.periods = {16.0f, 100.0f};
  features.time_unit = 50.0f;
  return features;
}

struct Acting {
  std::shared_ptr<llmdpd::Context> context;
  std::shared_ptr<llmdpd::Prompts> prompts;
  std::shared_ptr<llmdpd::Sampler> sampler;
  Floats observations;
  std::vector<std::int64_t> times, prompt_of;
  std::vector<std::uint64_t> keys;
  int action_dim;

  Floats act(int threads, Floats actions) const {
    const llmdpd::ActingBatch batch{static_cast<std::ptrdiff_t>(times.size()), observations.data(), times.data(),
                                    prompt_of.empty() ? nullptr : prompt_of.data(), keys.data()};
    llmdpd::act(*prompts, *sampler, nullptr, batch, threads, actions.data());
    return actions;
  }
  Floats room() const { return Floats(times.size() * action_dim); }
};

std::shared_ptr<llmdpd::Context> random_context(Random& random, Store& store, int state_dim, int action_dim) {
  const int heads = between(random, 1, 5), width = heads * between(random, 1, 20), layers = between(random, 0, 2);
  llmdpd::ContextFeatures features = random_features(random, state_dim);
  const int embedding = 2 * static_cast<int>(features.periods.size());
  llmdpd::ContextWeights weights{};
  weights.query = store.linear(width, static_cast<int>(features.own.size()) + embedding);
  for (int i = 0; i < layers; ++i) {
    weights.attention.push_back({store.norm(width), store.norm(width), store.linear(width, width),
                                 store.linear(width, width), store.linear(2 * width, width),
                                 store.linear(width, 2 * width)});
  }
  weights.norm = store.norm(width);
  weights.waypoint_query = store.linear(width, width);
  weights.similarity = store.make(heads * (features.geometry.size() + (embedding > 0 ? 1 : 0)));
  return std::make_shared<llmdpd::Context>(
      llmdpd::ContextSizes{state_dim, width, heads, layers, action_dim, between(random, 1, 3)}, std::move(features),
      weights, llmdpd::active_kernels(false), llmdpd::active_layers());
}

std::shared_ptr<llmdpd::Prompts> random_prompts(Random& random, Store& store,
                                                std::shared_ptr<llmdpd::Context> context, int count, int prompt_dim) {
  const llmdpd::ContextNet& net = context->net();
  const int steps = between(random, 1, 70);
  const std::size_t rows = std::size_t(count) * steps;
  llmdpd::PromptTensors tensors{};
  tensors.prompts = count, tensors.prompt_dim = prompt_dim, tensors.steps = steps;
  tensors.pooled = store.make(std::size_t(count) * prompt_dim);
  tensors.query_init = store.make(std::size_t(count) * net.width);
  tensors.bias = store.make(rows), tensors.waypoint_bias = store.make(rows);
  for (int i = 0; i < net.layers; ++i) {
    tensors.keys.push_back(store.make(rows * net.width));
    tensors.values.push_back(store.make(rows * net.width));
  }
  tensors.waypoint_key = store.make(rows * net.width);
  tensors.waypoints = store.make(rows * net.found_dim());
  tensors.there = store.make(rows * net.compared());
  return std::make_shared<llmdpd::Prompts>(std::move(context), tensors);
}

Acting random_acting(Random& random, int states) {
  constexpr int kTime = 4;
  Store store(random);
  Acting acting;
  const int state_dim = between(random, 3, 30), prompt_dim = between(random, 0, 12), prompts = between(random, 1, 3);
  Sizes z(random);
  acting.action_dim = z.action;
  acting.context = random_context(random, store, state_dim, z.action);
  acting.prompts = random_prompts(random, store, acting.context, prompts, prompt_dim);
  z.state = acting.context->net().output_dim, z.prompt = prompt_dim;
  const Weights weights(random, z.hidden, z.action + kTime + z.state + z.prompt, z.action);
  const Schedule schedule(random, z);
  const llmdpd::NetDims dims{z.action, kTime, z.state, z.prompt, z.hidden};
  const auto net = std::make_shared<llmdpd::PackedNet>(dims, weights.first.data(), weights.first_bias.data(),
                                                       weights.trunk, kernels(random));
  const auto* table = schedule.schedule.table;
  acting.sampler = std::make_shared<llmdpd::Sampler>(
      net, std::vector<llmdpd::StepCoefficients>(table, table + z.steps),
      normals(random, std::size_t(z.steps) * kTime).data(), 1.0f, schedule.schedule.clip);
  acting.observations = normals(random, std::size_t(states) * state_dim);
  const bool own = prompts > 1;
  for (int i = 0; i < states; ++i) {
    acting.times.push_back(between(random, 0, 500));
    acting.keys.push_back(random());
    if (own) acting.prompt_of.push_back(between(random, 0, prompts - 1));
  }
  return acting;
}

}  // namespace

Call make_acting(Random& random) {
  const auto acting = std::make_shared<Acting>(random_acting(random, between(random, 1, 60)));
  return [acting](int threads) { return acting->act(threads, acting->room()); };
}

Call make_features(Random& random) {
  Store store(random);
  const int state_dim = between(random, 3, 30), rows = between(random, 1, 300);
  const auto context = random_context(random, store, state_dim, 2);  // by copies of the weights
  const Floats observations = normals(random, std::size_t(rows) * state_dim);
  return [context, observations, rows](int threads) {
    const std::size_t own = std::size_t(rows) * context->net().own.count;
    Floats out(own + std::size_t(rows) * context->net().geometry.count);
    llmdpd::read_features(*context, rows, observations.data(), threads, out.data(), out.data() + own);
    return out;
  };
}

}  // namespace inputs

void test_acting_allocates_nothing() {
  using namespace inputs;
  const unsigned seed = std::random_device{}();
  std::printf("acting: seed %u\n", seed);
  Random random(seed);
  for (const std::string& isa : llmdpd::runnable_isas()) {
    llmdpd::set_isa(isa);
    for (const int states : {1, 2, 64}) {
      const Acting acting = random_acting(random, states);
      const Floats expected = acting.act(1, acting.room());
      Floats room = acting.room();
      const long before = allocations.load();
      for (int call = 0; call < 20; ++call) room = acting.act(1, std::move(room));
      CHECK(allocations.load() == before);
      CHECK(room == expected);
    }
  }
}
