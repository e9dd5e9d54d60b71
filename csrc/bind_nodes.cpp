#include <pybind11/stl.h>

#include <tuple>

#include "bindings.h"
#include "chain_node.h"
#include "dispatch.h"
#include "noise_node.h"
#include "bind_prepared.h"
#include "reading.h"

namespace {

using llmdpd::Weight;
using FloatsList = std::vector<Floats>;
using Optional = std::optional<Floats>;

llmdpd::LayerTools tools_for(int threads) {
  if (threads < 1) throw std::invalid_argument("threads start at 1");
  return {llmdpd::active_kernels(false), llmdpd::active_layers(), threads};
}

std::vector<Weight> weights_of(const FloatsList& arrays) {
  std::vector<Weight> weights;
  for (const Floats& array : arrays) {
    const py::ssize_t dims = array.ndim();
    if (dims < 1 || dims > 2 || (dims == 2 && array.shape(1) < 1)) throw std::invalid_argument("wrong shape: weight");
    require_shape(array, {array.shape(), array.shape() + dims}, "weight");  // aligned, that is
    weights.push_back({array.data(), small(array.shape(0), "weight"), dims == 1 ? 0 : small(array.shape(1), "weight")});
  }
  return weights;
}

const float* data_of(const Optional& array, const std::vector<py::ssize_t>& shape, const char* name) {
  if (!array) return nullptr;
  require_shape(*array, shape, name);
  return array->data();
}

float* target(Floats& array, const std::vector<py::ssize_t>& shape, const char* name) {
  require_shape(array, shape, name);
  return array.mutable_data();
}

float* memory_of(Floats& array, std::size_t floats, const char* name) {
  return target(array, {static_cast<py::ssize_t>(floats)}, name);
}

int columns_of(const Floats& array, const char* name) {
  if (array.ndim() != 2 || array.shape(1) < 1) throw std::invalid_argument(std::string("wrong shape: ") + name);
  return small(array.shape(1), name);
}

// text, encoder's layers and heads, layers, heads, waypoints, similarity, A, G: `ContextShape` of
// llmdpd/ops/reading.py.
using Shape = std::tuple<bool, int, int, int, int, bool, bool, int, int>;

llmdpd::ContextShape shape_of(const Shape& shape) {
  const auto& [text, encoder_layers, encoder_heads, layers, heads, waypoints, similarity, actions, geometry] = shape;
  if (encoder_layers < 0 || encoder_heads < 1 || layers < 0 || heads < 1 || actions < 0 || geometry < 0) {
    throw std::invalid_argument("wrong sizes: context");
  }
  return {text, encoder_layers, encoder_heads, layers, heads, waypoints, similarity, actions, geometry};
}

// Holds the arrays that a node reads.
struct PromptNode {
  FloatsList weights;
  Optional text, keep_text, keep_trajectory;
  Floats tokens;
  Optional embedded;
  Floats mask, bias;
  llmdpd::PromptReading reading;
};

std::shared_ptr<PromptNode> make_prompts(const Shape& shape, const Optional& text, const Optional& keep_text,
                                         const Optional& keep_trajectory, const Floats& tokens,
                                         const Optional& embedded, const Floats& mask, const Floats& bias,
                                         const FloatsList& weights, int threads) {
  if (mask.ndim() != 2 || mask.shape(0) < 1 || mask.shape(1) < 1) throw std::invalid_argument("wrong shape: mask");
  const py::ssize_t prompts = mask.shape(0), steps = mask.shape(1);
  llmdpd::PromptsShown shown{};
  shown.prompts = small(prompts, "prompts"), shown.steps = small(steps, "steps");
  const llmdpd::ContextShape parts = shape_of(shape);
  if (parts.text != text.has_value()) throw std::invalid_argument("wrong kind: text");
  shown.text_dim = text ? columns_of(*text, "text") : 0;
  shown.text = data_of(text, {prompts, shown.text_dim}, "text");
  shown.keep_text = data_of(keep_text, {prompts, 1}, "keep_text");
  shown.keep_trajectory = data_of(keep_trajectory, {prompts, 1}, "keep_trajectory");
  shown.token_dim = columns_of(tokens, "steps");
  require_shape(tokens, {prompts * steps, shown.token_dim}, "steps");
  shown.tokens = tokens.data();
  shown.embedded_dim = embedded ? columns_of(*embedded, "embedded") : 0;
  shown.embedded = data_of(embedded, {prompts * steps, shown.embedded_dim}, "embedded");
  require_shape(mask, {prompts, steps}, "mask");
  require_shape(bias, {prompts, steps}, "bias");
  shown.mask = mask.data(), shown.bias = bias.data();
  llmdpd::PromptReading reading(parts, shown, weights_of(weights), tools_for(threads));
  return std::make_shared<PromptNode>(
      PromptNode{weights, text, keep_text, keep_trajectory, tokens, embedded, mask, bias, std::move(reading)});
}

// pooled [P, Z], then keys, values and the waypoints' keys [P, T + 1, W].
template <class Pointer, class Arrays, class Of>
std::vector<Pointer> rows_of(const PromptNode& node, Arrays& arrays, const Of& of) {
  if (arrays.size() != node.reading.rows_count() + 1) throw std::invalid_argument("wrong number: results");
  const py::ssize_t prompts = node.mask.shape(0), steps = node.mask.shape(1);
  std::vector<Pointer> rows{of(arrays[0], {prompts, node.reading.vector_dim()})};
  for (std::size_t i = 1; i < arrays.size(); ++i) {
    rows.push_back(of(arrays[i], {prompts, steps + 1, node.reading.width()}));
  }
  return rows;
}

Call prompts_forward_call(const std::shared_ptr<PromptNode>& holder, Floats& tape, FloatsList results) {
  held(holder);
  auto rows = rows_of<float*>(*holder, results, [](Floats& array, const std::vector<py::ssize_t>& shape) {
    return target(array, shape, "result");
  });
  float* kept = memory_of(tape, holder->reading.tape_floats(), "tape");
  float* pooled = rows[0];
  rows.erase(rows.begin());
  return [=](int) { holder->reading.forward(kept, pooled, rows); };
}

Call prompts_backward_call(const std::shared_ptr<PromptNode>& holder, Floats& tape, const FloatsList& grads,
                           Floats& gradients) {
  held(holder);
  auto rows = rows_of<const float*>(*holder, grads, [](const Floats& array, const std::vector<py::ssize_t>& shape) {
    require_shape(array, shape, "gradient");
    return array.data();
  });
  float* kept = memory_of(tape, holder->reading.tape_floats(), "tape");
  float* to = memory_of(gradients, holder->reading.gradient_numbers(), "gradients");
  const float* d_pooled = rows[0];
  rows.erase(rows.begin());
  return [=](int) { holder->reading.backward(kept, d_pooled, rows, to); };
}

struct StateNode {
  FloatsList given;
  Floats own, here, bias;
  Optional waypoint_bias, there, waypoints;
  llmdpd::StateReading reading;
};

std::shared_ptr<StateNode> make_states(const Shape& shape, const Floats& own, const Floats& here, const Floats& bias,
                                       const Optional& waypoint_bias, const Optional& there, const Optional& waypoints,
                                       const FloatsList& given, int threads) {
  const llmdpd::ContextShape parts = shape_of(shape);
  llmdpd::StatesSeen seen{};
  seen.own_dim = columns_of(own, "own");
  if (bias.ndim() != 2 || bias.shape(0) < 1 || bias.shape(1) < 1) throw std::invalid_argument("wrong shape: bias");
  const py::ssize_t prompts = bias.shape(0), steps = bias.shape(1), states = own.shape(0);
  if (states < 1 || states % prompts != 0) throw std::invalid_argument("wrong number: states");
  if (here.ndim() != 2) throw std::invalid_argument("wrong shape: here");
  seen.prompts = small(prompts, "prompts"), seen.rows = small(states / prompts, "states");
  seen.steps = small(steps, "steps");
  small(prompts * steps, "steps of all prompts");
  seen.compared = small(here.shape(1), "here");
  require_shape(own, {states, seen.own_dim}, "own");
  require_shape(here, {states, seen.compared}, "here");
  require_shape(bias, {prompts, steps}, "bias");
  if (parts.waypoints != waypoints.has_value() || parts.waypoints != waypoint_bias.has_value() ||
      parts.similarity != there.has_value() || (parts.similarity && !parts.waypoints)) {
    throw std::invalid_argument("wrong kind: waypoints");
  }
  if (waypoints) {
    seen.waypoint_dim = waypoints->ndim() == 3 ? small(waypoints->shape(2), "waypoints") : 0;
    const int far = seen.waypoint_dim - parts.action_dim;
    const bool whole = parts.geometry > 0 ? far % parts.geometry == 0 : far == 0;
    if (seen.waypoint_dim < 1 || far < 0 || !whole || parts.geometry > seen.compared) {
      throw std::invalid_argument("wrong sizes: waypoints");
    }
  }
  seen.own = own.data(), seen.here = here.data(), seen.bias = bias.data();
  seen.waypoint_bias = data_of(waypoint_bias, {prompts, steps}, "waypoint_bias");
  seen.there = data_of(there, {prompts, steps, seen.compared}, "there");
  seen.waypoints = data_of(waypoints, {prompts, steps, seen.waypoint_dim}, "waypoints");
  llmdpd::StateReading reading(parts, seen, weights_of(given), tools_for(threads));
  return std::make_shared<StateNode>(
      StateNode{given, own, here, bias, waypoint_bias, there, waypoints, std::move(reading)});
}

Call states_forward_call(const std::shared_ptr<StateNode>& holder, Floats& tape, FloatsList results) {
  held(holder);
  if (results.size() != 1) throw std::invalid_argument("wrong number: results");
  llmdpd::StateReading& reading = holder->reading;
  float* condition = target(results[0], {reading.states(), reading.condition_dim()}, "result");
  float* kept = memory_of(tape, reading.tape_floats(), "tape");
  return [=](int) { holder->reading.forward(kept, condition); };
}

Call states_backward_call(const std::shared_ptr<StateNode>& holder, Floats& tape, const FloatsList& grads,
                          Floats& gradients) {
  held(holder);
  if (grads.size() != 1) throw std::invalid_argument("wrong number: gradients");
  llmdpd::StateReading& reading = holder->reading;
  require_shape(grads[0], {reading.states(), reading.condition_dim()}, "gradient");
  float* kept = memory_of(tape, reading.tape_floats(), "tape");
  float* to = memory_of(gradients, reading.gradient_numbers(), "gradients");
  const float* d_condition = grads[0].data();
  return [=](int) { holder->reading.backward(kept, d_condition, to); };
}

struct PredictionNode {
  FloatsList given;
  Floats actions, waves;
  Indices place;
  Floats hidden_tape;
  llmdpd::NoiseNode node;

  float* hidden() { return hidden_tape.size() == 0 ? nullptr : hidden_tape.mutable_data(); }
};

// A pool's buffer for what the hidden layers keep for the pass backward, empty where that is more than `most` floats.
Floats kept_buffer(std::size_t floats, py::ssize_t most) {
  const auto count = static_cast<py::ssize_t>(floats);
  return pooled_buffer(count <= most ? count : 0);
}

// keep: the most floats that the hidden layers may keep.
std::shared_ptr<PredictionNode> make_prediction(const Floats& actions, const Floats& waves, const Indices& place,
                                                const FloatsList& given, bool prompted, bool bf16, py::ssize_t keep,
                                                int threads) {
  llmdpd::NoisyActions noisy{};
  noisy.action_dim = columns_of(actions, "actions"), noisy.time_dim = columns_of(waves, "waves");
  noisy.rows = small(actions.shape(0), "actions"), noisy.levels = small(waves.shape(0), "waves");
  if (noisy.rows < 1 || noisy.levels < 1) throw std::invalid_argument("wrong shape: actions or waves");
  require_shape(actions, {noisy.rows, noisy.action_dim}, "actions");
  require_shape(waves, {noisy.levels, noisy.time_dim}, "waves");
  require_shape(place, {noisy.rows}, "place");
  noisy.actions = actions.data(), noisy.waves = waves.data(), noisy.place = place.data();
  llmdpd::NoiseNode node(noisy, weights_of(given), tools_for(threads), llmdpd::active_kernels(bf16), prompted);
  return std::make_shared<PredictionNode>(PredictionNode{
      given, actions, waves, place, kept_buffer(node.hidden_tape_floats(), keep), std::move(node)});
}

Call prediction_forward_call(const std::shared_ptr<PredictionNode>& holder, Floats& tape, FloatsList results) {
  held(holder);
  if (results.size() != 1) throw std::invalid_argument("wrong number: results");
  float* out = target(results[0], {holder->actions.shape(0), holder->actions.shape(1)}, "result");
  float* kept = memory_of(tape, holder->node.tape_floats(), "tape");
  float* hidden = holder->hidden();
  return [=](int) { holder->node.forward(kept, hidden, out); };
}

Call prediction_backward_call(const std::shared_ptr<PredictionNode>& holder, Floats& tape, const FloatsList& grads,
                         Floats& gradients) {
  held(holder);
  if (grads.size() != 1) throw std::invalid_argument("wrong number: gradients");
  require_shape(grads[0], {holder->actions.shape(0), holder->actions.shape(1)}, "gradient");
  float* kept = memory_of(tape, holder->node.tape_floats(), "tape");
  float* to = memory_of(gradients, holder->node.gradient_numbers(), "gradients");
  const float *d_out = grads[0].data(), *hidden = holder->hidden();
  return [=](int) { holder->node.backward(kept, hidden, d_out, to); };
}

struct ChainOfSteps {
  FloatsList given;
  Floats waves, table;
  Keys keys;
  Optional noise;
  std::vector<py::ssize_t> actions;  // the results' shape
  Floats steps_tape;
  llmdpd::ChainNode node;

  float* steps() { return steps_tape.size() == 0 ? nullptr : steps_tape.mutable_data(); }
};

// given: the states' first. keep: as of a prediction.
std::shared_ptr<ChainOfSteps> make_chain(const Floats& waves, const Floats& table, const Keys& keys,
                                         const Optional& noise, float start, float clip, int samples, int action_dim,
                                         const FloatsList& given, bool prompted, bool need_state, bool bf16,
                                         py::ssize_t keep, int threads) {
  if (given.empty() || given[0].ndim() != 2 || given[0].shape(0) < 1) throw std::invalid_argument("wrong shape: state");
  const py::ssize_t states = given[0].shape(0), steps = table.ndim() == 2 ? table.shape(0) : 0;
  if (samples < 1 || steps < 1 || action_dim < 1) throw std::invalid_argument("samples, steps and actions start at 1");
  llmdpd::ChainShown shown{};
  shown.states = states, shown.samples = samples, shown.action_dim = action_dim;
  shown.time_dim = columns_of(waves, "waves");
  require_shape(waves, {steps, shown.time_dim}, "waves");
  require_shape(table, {steps, 6}, "table");
  small(states, "states");
  const auto* rows_of_table = reinterpret_cast<const llmdpd::StepCoefficients*>(table.data());
  shown.waves = waves.data(), shown.schedule = {small(steps, "table"), rows_of_table, start, clip};
  const bool key_per_state = keys.ndim() != 1 || keys.shape(0) != 1 || states == 1;
  require_shape(keys, {key_per_state ? states : 1}, "keys");
  const float* xi = data_of(noise, {steps + 1, states * samples, action_dim}, "noise");
  shown.noise = {xi, keys.data(), key_per_state};
  shown.need_state = need_state;
  llmdpd::ChainNode node(shown, weights_of(given), tools_for(threads), llmdpd::active_kernels(bf16), prompted);
  const Floats steps_tape = kept_buffer(node.steps_tape_floats(), keep);
  return std::make_shared<ChainOfSteps>(ChainOfSteps{
      given, waves, table, keys, noise, {states, samples, action_dim}, steps_tape, std::move(node)});
}

Call chain_forward_call(const std::shared_ptr<ChainOfSteps>& holder, Floats& tape, FloatsList results) {
  held(holder);
  if (results.size() != 1) throw std::invalid_argument("wrong number: results");
  float* actions = target(results[0], holder->actions, "result");
  float* kept = memory_of(tape, holder->node.tape_floats(), "tape");
  float* steps = holder->steps();
  return [=](int) { holder->node.forward(kept, steps, actions); };
}

Call chain_backward_call(const std::shared_ptr<ChainOfSteps>& holder, Floats& tape, const FloatsList& grads,
                    Floats& gradients) {
  held(holder);
  if (grads.size() != 1) throw std::invalid_argument("wrong number: gradients");
  require_shape(grads[0], holder->actions, "gradient");
  float* kept = memory_of(tape, holder->node.tape_floats(), "tape");
  float* to = memory_of(gradients, holder->node.gradient_numbers(), "gradients");
  const float *d_actions = grads[0].data(), *steps = holder->steps();
  return [=](int) { holder->node.backward(kept, steps, d_actions, to); };
}

// What `make` checks and prepares, done at once; how many threads is the node's own matter.
template <auto make, class Node, class... Arguments>
void at_once(const std::shared_ptr<Node>& holder, Arguments... arguments) {
  const Call call = make(holder, arguments...);
  py::gil_scoped_release unlocked;
  call(0);
}

// Defines a node, whose passes are called at once, or later as add_KIND_forward and add_KIND_backward.
template <auto forward, auto backward, class Node, class Tape>
void define(py::module_& module, const char* name, const char* words, const std::string& kind,
            const Tape& tape_floats) {
  const auto tape = py::arg("tape").noconvert(), results = py::arg("results").noconvert();
  const auto grads = py::arg("grads").noconvert(), gradients = py::arg("gradients").noconvert();
  py::class_<Node, std::shared_ptr<Node>>(module, name, words)
      .def("tape_floats", [tape_floats](const std::shared_ptr<Node>& node) { return tape_floats(held(node)); })
      .def("forward", &at_once<forward, Node, Floats&, FloatsList>, tape, results)
      .def("backward", &at_once<backward, Node, Floats&, const FloatsList&, Floats&>, tape, grads, gradients);
  define_later(module, ("add_" + kind + "_forward").c_str(), forward, py::arg("node"), tape, results);
  define_later(module, ("add_" + kind + "_backward").c_str(), backward, py::arg("node"), tape, grads, gradients);
}

}  // namespace

void bind_nodes(py::module_& module) {
  const auto of_reading = [](const auto& node) { return node.reading.tape_floats(); };
  const auto of_node = [](const auto& node) { return node.node.tape_floats(); };
  define<&prompts_forward_call, &prompts_backward_call, PromptNode>(
      module, "PromptNode", "Prompts read; see reading.h.", "prompts", of_reading);
  define<&states_forward_call, &states_backward_call, StateNode>(
      module, "StateNode", "States read; see reading.h.", "states", of_reading);
  define<&prediction_forward_call, &prediction_backward_call, PredictionNode>(
      module, "PredictionNode", "Noise predicted; see noise_node.h.", "prediction", of_node);
  define<&chain_forward_call, &chain_backward_call, ChainOfSteps>(
      module, "ChainNode", "Actions sampled; see chain_node.h.", "chain", of_node);
  module.def("prompt_node", &make_prompts, py::arg("shape"), py::arg("text").noconvert(),
             py::arg("keep_text").noconvert(), py::arg("keep_trajectory").noconvert(), py::arg("steps").noconvert(),
             py::arg("embedded").noconvert(), py::arg("mask").noconvert(), py::arg("bias").noconvert(),
             py::arg("weights").noconvert(), py::arg("threads"));
  module.def("state_node", &make_states, py::arg("shape"), py::arg("own").noconvert(), py::arg("here").noconvert(),
             py::arg("bias").noconvert(), py::arg("waypoint_bias").noconvert(), py::arg("there").noconvert(),
             py::arg("waypoints").noconvert(), py::arg("given").noconvert(), py::arg("threads"));
  module.def("prediction_node", &make_prediction, py::arg("actions").noconvert(), py::arg("waves").noconvert(),
             py::arg("place").noconvert(), py::arg("given").noconvert(), py::arg("prompted"), py::arg("bf16"),
             py::arg("keep"), py::arg("threads"));
  module.def("chain_node", &make_chain, py::arg("waves").noconvert(), py::arg("table").noconvert(),
             py::arg("keys").noconvert(), py::arg("noise").noconvert(), py::arg("start"), py::arg("clip"),
             py::arg("samples"), py::arg("action_dim"), py::arg("given").noconvert(), py::arg("prompted"),
             py::arg("need_state"), py::arg("bf16"), py::arg("keep"), py::arg("threads"));
}
