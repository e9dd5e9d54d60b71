// Nodes of training as calls for the test of concurrency (concurrency_test.cpp).
#include <algorithm>
#include <list>
#include <memory>

#include "../chain_node.h"
#include "../noise_node.h"
#include "../reading.h"
#include "inputs.h"

namespace inputs {
namespace {

// Random numbers that a node reads; weights in its order.
class Given {
 public:
  explicit Given(Random& random) : random_(random) {}
  const float* normals(std::size_t count) { return parts_.emplace_back(inputs::normals(random_, count, 0.3f)).data(); }
  const float* constant(std::size_t count, float value) { return parts_.emplace_back(count, value).data(); }
  void plain(int rows, int columns) {
    weights.push_back({normals(std::size_t(rows) * std::max(columns, 1)), rows, columns});
  }
  void linear(int outputs, int inputs) { plain(outputs, inputs), plain(outputs, 0); }
  void norm(int width) { plain(width, 0), plain(width, 0); }

  std::vector<llmdpd::Weight> weights;

 private:
  Random& random_;
  std::list<Floats> parts_;
};

llmdpd::LayerTools tools(int threads) {
  return {llmdpd::active_kernels(false), llmdpd::active_layers(), threads};
}

void attention(Given& given, int width, int wide, bool norms_first) {
  if (norms_first) given.norm(width), given.norm(width), given.linear(width, width);
  given.linear(width, width);
  if (!norms_first) given.norm(width);
  given.linear(wide, width), given.linear(width, wide);
}

}  // namespace

Call make_prompt_reading(Random& random) {
  const auto given = std::make_shared<Given>(random);
  const int heads = between(random, 1, 3), width = heads * between(random, 1, 9), wide = between(random, 1, 30);
  const int prompts = between(random, 1, 14), steps = between(random, 1, 20), own = between(random, 1, 20);
  const int vector = between(random, 1, 9), features = between(random, 1, 9), waves = between(random, 1, 5);
  llmdpd::ContextShape shape{between(random, 0, 1) == 1, between(random, 0, 2), heads, between(random, 0, 2), 1,
                             between(random, 0, 1) == 1, false, 0, 0};
  llmdpd::PromptsShown shown{};
  shown.prompts = prompts, shown.steps = steps, shown.text_dim = shape.text ? 70 : 0;
  shown.token_dim = features + waves, shown.embedded_dim = between(random, 0, 4);
  const std::size_t rows = std::size_t(prompts) * steps;
  if (shape.text) {
    shown.text = given->normals(std::size_t(prompts) * shown.text_dim);
    shown.keep_text = given->normals(prompts);
    given->linear(90, 70), given->linear(8, 90), given->linear(vector, 8);
  }
  shown.tokens = given->normals(rows * shown.token_dim);
  if (shown.embedded_dim) shown.embedded = given->normals(rows * shown.embedded_dim);
  shown.mask = given->constant(rows, 1.0f), shown.bias = given->constant(rows, 0.0f);
  given->linear(width, features), given->plain(width, waves);
  for (int i = 0; i < shape.encoder_layers; ++i) {
    given->norm(width), given->plain(3 * width, width), given->plain(3 * width, 0);
    attention(*given, width, wide, false);
  }
  given->norm(width), given->linear(5, width), given->linear(vector, 5);
  given->linear(own, width + shown.embedded_dim), given->plain(own, 0);
  for (int i = 0; i < shape.layers; ++i) given->norm(own), given->linear(own, own), given->linear(own, own);
  if (shape.waypoints) given->linear(own, own);
  return [given, shape, shown](int threads) {
    llmdpd::PromptReading reading(shape, shown, given->weights, tools(threads));
    const std::size_t pooled = std::size_t(shown.prompts) * reading.vector_dim();
    const std::size_t each = std::size_t(shown.prompts) * (shown.steps + 1) * reading.width();
    Floats out(pooled + reading.rows_count() * each + reading.gradient_numbers(), -7.0f), tape(reading.tape_floats());
    std::vector<float*> rows;
    for (std::size_t i = 0; i < reading.rows_count(); ++i) rows.push_back(out.data() + pooled + i * each);
    reading.forward(tape.data(), out.data(), rows);
    reading.backward(tape.data(), out.data(), {rows.begin(), rows.end()},
                     out.data() + pooled + reading.rows_count() * each);
    return out;
  };
}

Call make_state_reading(Random& random) {
  const auto given = std::make_shared<Given>(random);
  const int heads = between(random, 1, 3), width = heads * between(random, 1, 9), wide = between(random, 1, 30);
  llmdpd::ContextShape shape{between(random, 0, 1) == 1, 0, 1, between(random, 0, 2), heads,
                             between(random, 0, 1) == 1, false, 2, 3};
  shape.similarity = shape.waypoints && between(random, 0, 1);
  llmdpd::StatesSeen seen{};
  seen.prompts = between(random, 1, 5), seen.rows = between(random, 1, 30), seen.steps = between(random, 1, 20);
  seen.own_dim = between(random, 1, 20), seen.compared = 4, seen.waypoint_dim = shape.action_dim + 2 * shape.geometry;
  const std::size_t states = std::size_t(seen.prompts) * seen.rows, moments = std::size_t(seen.prompts) * seen.steps;
  seen.own = given->normals(states * seen.own_dim), seen.here = given->normals(states * seen.compared);
  seen.bias = given->constant(moments, 0.0f), seen.waypoint_bias = given->constant(moments, 0.0f);
  seen.there = given->normals(moments * seen.compared), seen.waypoints = given->normals(moments * seen.waypoint_dim);
  given->plain(seen.prompts, 7);
  const int memory = static_cast<int>(moments);
  for (int i = 0; i < 2 * shape.layers + (shape.waypoints ? 1 : 0); ++i) given->plain(memory, width);
  given->linear(width, seen.own_dim + (shape.text ? 3 : 0));
  for (int i = 0; i < shape.layers; ++i) attention(*given, width, wide, true);
  if (shape.layers) given->norm(width);
  if (shape.waypoints) given->linear(width, width);
  if (shape.similarity) given->plain(heads, seen.compared);
  return [given, shape, seen](int threads) {
    llmdpd::StateReading reading(shape, seen, given->weights, tools(threads));
    const std::size_t condition = reading.states() * reading.condition_dim();
    Floats out(condition + reading.gradient_numbers(), -7.0f), tape(reading.tape_floats());
    reading.forward(tape.data(), out.data());
    reading.backward(tape.data(), out.data(), out.data() + condition);
    return out;
  };
}

namespace {

// The noise network's weights behind states, and prompts where it has any.
void network(Given& given, int states, int prompts, int state, int prompt, int hidden, int action, int time) {
  given.plain(states, state);
  if (prompt) given.plain(prompts, prompt);
  given.linear(2 * time, time), given.linear(time, 2 * time);
  given.linear(hidden, action + time + state + prompt);
  given.linear(hidden, hidden), given.linear(hidden, hidden), given.linear(action, hidden);
}

}  // namespace

Call make_noise_node(Random& random) {
  const auto given = std::make_shared<Given>(random);
  const int prompts = between(random, 1, 5), hidden = between(random, 1, 80), state = between(random, 1, 20);
  const int prompt = between(random, 0, 1) * between(random, 1, 20);
  llmdpd::NoisyActions noisy{};
  noisy.rows = prompts * between(random, 1, 40), noisy.action_dim = between(random, 1, 9);
  noisy.levels = between(random, 1, 5), noisy.time_dim = 2 * between(random, 1, 5);
  noisy.actions = given->normals(noisy.rows * noisy.action_dim);
  noisy.waves = given->normals(std::size_t(noisy.levels) * noisy.time_dim);
  const auto place = std::make_shared<std::vector<std::int64_t>>();
  for (std::ptrdiff_t r = 0; r < noisy.rows; ++r) place->push_back(between(random, 0, noisy.levels - 1));
  noisy.place = place->data();
  network(*given, static_cast<int>(noisy.rows), prompts, state, prompt, hidden, noisy.action_dim, noisy.time_dim);
  const llmdpd::TileKernels& trunk = kernels(random);
  return [given, place, noisy, prompt, &trunk](int threads) {
    llmdpd::NoiseNode node(noisy, given->weights, tools(threads), trunk, prompt > 0);
    const std::size_t results = noisy.rows * noisy.action_dim;
    Floats out(results + 2 * node.gradient_numbers(), -7.0f);
    Floats tape(node.tape_floats()), hidden(node.hidden_tape_floats());
    node.forward(tape.data(), hidden.data(), out.data());
    node.backward(tape.data(), hidden.data(), out.data(), out.data() + results);
    node.backward(tape.data(), nullptr, out.data(), out.data() + results + node.gradient_numbers());
    return out;
  };
}

Call make_chain_node(Random& random) {
  const auto given = std::make_shared<Given>(random);
  const Sizes z(random);
  const auto schedule = std::make_shared<Schedule>(random, z);
  const int time = 2 * between(random, 1, 5), state = z.state + 1;
  llmdpd::ChainShown shown{};
  shown.states = z.states, shown.samples = z.samples, shown.action_dim = z.action, shown.time_dim = time;
  shown.waves = given->normals(std::size_t(z.steps) * time);
  shown.schedule = schedule->schedule, shown.noise = schedule->noise, shown.need_state = true;
  network(*given, z.states, between(random, 0, 1) ? z.states : 1, state, z.prompt, z.hidden, z.action, time);
  const llmdpd::TileKernels& trunk = kernels(random);
  return [given, schedule, shown, prompt = z.prompt, &trunk](int threads) {
    llmdpd::ChainNode node(shown, given->weights, tools(threads), trunk, prompt > 0);
    const std::size_t results = shown.states * shown.samples * shown.action_dim;
    Floats out(results + 2 * node.gradient_numbers(), -7.0f);
    Floats tape(node.tape_floats()), steps(node.steps_tape_floats());
    node.forward(tape.data(), steps.data(), out.data());
    node.backward(tape.data(), steps.data(), out.data(), out.data() + results);
    node.backward(tape.data(), nullptr, out.data(), out.data() + results + node.gradient_numbers());
    return out;
  };
}

}  // namespace inputs
