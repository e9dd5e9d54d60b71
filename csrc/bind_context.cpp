#include <pybind11/stl.h>

#include <map>
#include <string>
#include <utility>

#include "bindings.h"
#include "context.h"
#include "dispatch.h"

namespace {

using llmdpd::Context;
using llmdpd::ContextWeights;
using llmdpd::Prompts;
using Arrays = std::map<std::string, Floats>;

constexpr py::ssize_t kMaxStates = py::ssize_t{1} << 32;

// Null where the part is switched off.
const Floats* find(const Arrays& arrays, const std::string& name) {
  const auto found = arrays.find(name);
  return found == arrays.end() ? nullptr : &found->second;
}

const float* required(const Arrays& arrays, const std::string& name, const std::vector<py::ssize_t>& shape) {
  const Floats* array = find(arrays, name);
  if (!array) throw std::invalid_argument("missing: " + name);
  require_shape(*array, shape, name.c_str());
  return array->data();
}

// Of a weight [outputs, columns] the first `inputs`; the bias beside it.
llmdpd::Linear linear_of(const Arrays& arrays, const std::string& name, int outputs, int inputs, int columns) {
  const float* weight = required(arrays, name + ".weight", {outputs, columns});
  return {{weight, columns, outputs, inputs}, required(arrays, name + ".bias", {outputs})};
}

llmdpd::Linear linear_of(const Arrays& arrays, const std::string& name, int outputs, int inputs) {
  return linear_of(arrays, name, outputs, inputs, inputs);
}

llmdpd::Norm norm_of(const Arrays& arrays, const std::string& name, int width) {
  return {required(arrays, name + ".weight", {width}), required(arrays, name + ".bias", {width})};
}

// kinds [F, 5]: kind, one, other, and the two points that must be present; numbers [F, 2]: scale, offset.
std::vector<llmdpd::Feature> features_of(const Integers& kinds, const Floats& numbers, int state_dim, int points) {
  const py::ssize_t count = kinds.ndim() == 2 ? kinds.shape(0) : 0;
  require_shape(kinds, {count, 5}, "features");
  require_shape(numbers, {count, 2}, "features' numbers");
  std::vector<llmdpd::Feature> features;
  for (py::ssize_t i = 0; i < count; ++i) {
    const std::int32_t* k = kinds.data(i, 0);
    const auto within = [](std::int32_t index, std::int32_t low, int high) { return index >= low && index < high; };
    if (!within(k[0], 0, 4) || !within(k[1], 0, state_dim) || !within(k[2], 0, state_dim) ||
        !within(k[3], -1, points) || !within(k[4], -1, points)) {
      throw std::invalid_argument("a feature of what is not there");
    }
    features.push_back({k[0], k[1], k[2], {k[3], k[4]}, *numbers.data(i, 0), *numbers.data(i, 1)});
  }
  return features;
}

// Columns of each point.
void points_of(const std::vector<std::vector<std::int32_t>>& points, int state_dim, llmdpd::ContextFeatures& features) {
  for (const std::vector<std::int32_t>& point : points) {
    for (const std::int32_t column : point) {
      if (column < 0 || column >= state_dim) throw std::invalid_argument("a point of what is not there");
      features.point_columns.push_back(column);
    }
    features.point_ends.push_back(static_cast<std::int32_t>(features.point_columns.size()));
  }
}

std::shared_ptr<Context> make_context(int state_dim, int action_dim, int lookaheads, int heads,
                                      const std::vector<std::vector<std::int32_t>>& points,
                                      const std::pair<Integers, Floats>& own,
                                      const std::pair<Integers, Floats>& geometry, const std::vector<float>& periods,
                                      float time_unit, const Arrays& weights) {
  if (state_dim < 0 || action_dim < 1 || lookaheads < 0 || heads < 0 || !(time_unit > 0)) {
    throw std::invalid_argument("wrong sizes of the context");
  }
  llmdpd::ContextFeatures features{};
  points_of(points, state_dim, features);
  features.own = features_of(own.first, own.second, state_dim, static_cast<int>(points.size()));
  features.geometry = features_of(geometry.first, geometry.second, state_dim, static_cast<int>(points.size()));
  features.periods = periods;
  features.time_unit = time_unit;
  ContextWeights packed{};
  llmdpd::ContextSizes sizes{state_dim, 0, heads, 0, action_dim, lookaheads};
  if (const Floats* query = find(weights, "query.weight")) {
    if (query->ndim() != 2) throw std::invalid_argument("wrong shape: query.weight");
    const int width = small(query->shape(0), "width"), columns = small(query->shape(1), "query.weight");
    const int streams = static_cast<int>(features.own.size() + 2 * periods.size());
    if (heads < 1 || width < 1 || width % heads != 0 || columns < streams) {
      throw std::invalid_argument("wrong sizes of the attention");
    }
    sizes.width = width;
    packed.query = linear_of(weights, "query", width, streams, columns);
    for (; find(weights, "layers." + std::to_string(sizes.layers) + ".query.weight"); ++sizes.layers) {
      const std::string layer = "layers." + std::to_string(sizes.layers) + ".";
      packed.attention.push_back({norm_of(weights, layer + "query_norm", width),
                                  norm_of(weights, layer + "forward_norm", width),
                                  linear_of(weights, layer + "query", width, width),
                                  linear_of(weights, layer + "out", width, width),
                                  linear_of(weights, layer + "widen", 2 * width, width),
                                  linear_of(weights, layer + "narrow", width, 2 * width)});
    }
    if (find(weights, "norm.weight")) packed.norm = norm_of(weights, "norm", width);
    if (find(weights, "waypoint_query.weight")) {
      packed.waypoint_query = linear_of(weights, "waypoint_query", width, width);
      const py::ssize_t compared = static_cast<py::ssize_t>(features.geometry.size()) + (periods.empty() ? 0 : 1);
      if (find(weights, "likeness")) packed.similarity = required(weights, "likeness", {heads, compared});
    }
  }
  return std::make_shared<Context>(sizes, std::move(features), packed, llmdpd::active_kernels(false),
                                   llmdpd::active_layers());
}

std::shared_ptr<Prompts> make_prompts(std::shared_ptr<Context> context, const Floats& pooled, const Arrays& memory) {
  const llmdpd::ContextNet& net = context->net();
  if (pooled.ndim() != 2 || pooled.shape(0) < 1) throw std::invalid_argument("wrong shape: pooled");
  const py::ssize_t prompts = pooled.shape(0);
  require_shape(pooled, {prompts, pooled.shape(1)}, "pooled");
  llmdpd::PromptTensors tensors{};
  tensors.prompts = prompts;
  tensors.prompt_dim = small(pooled.shape(1), "pooled");
  tensors.pooled = pooled.data();
  tensors.steps = 1;
  if (net.width > 0) {
    const Floats* bias = find(memory, "bias");
    const py::ssize_t steps = bias && bias->ndim() == 2 ? bias->shape(1) : 0;
    if (steps < 1) throw std::invalid_argument("wrong shape: bias");
    tensors.steps = small(steps, "steps");
    tensors.bias = required(memory, "bias", {prompts, steps});
    tensors.query_init = required(memory, "query_init", {prompts, net.width});
    const std::vector<py::ssize_t> heads{prompts, net.heads, steps, net.head_width()};
    for (int layer = 0; layer < net.layers; ++layer) {
      tensors.keys.push_back(required(memory, "key" + std::to_string(layer), heads));
      tensors.values.push_back(required(memory, "value" + std::to_string(layer), heads));
    }
    if (net.waypoint_query.packed_tiles) {
      tensors.waypoint_key = required(memory, "waypoint_key", heads);
      tensors.waypoint_bias = required(memory, "waypoint_bias", {prompts, steps});
      tensors.waypoints = required(memory, "waypoints", {prompts, steps, net.found_dim()});
      if (find(memory, "there")) tensors.there = required(memory, "there", {prompts, steps, net.compared()});
    }
  }
  return std::make_shared<Prompts>(std::move(context), tensors);
}

llmdpd::ActingBatch batch_of(const Prompts& prompts, const Floats& observations, const Indices& times,
                             const std::optional<Indices>& prompt_of, const Keys* keys, int threads) {
  if (observations.ndim() != 2) throw std::invalid_argument("wrong shape: observations");
  if (threads < 1) throw std::invalid_argument("threads start at 1");
  const py::ssize_t states = observations.shape(0);
  if (states > kMaxStates) throw std::invalid_argument("too many states for one call");
  require_shape(observations, {states, prompts.context().net().state_dim}, "observations");
  require_shape(times, {states}, "times");
  if (keys) require_shape(*keys, {states}, "keys");
  if (prompt_of) {
    require_shape(*prompt_of, {states}, "prompt_of");
    for (py::ssize_t i = 0; i < states; ++i) {
      if (*prompt_of->data(i) < 0 || *prompt_of->data(i) >= prompts.count()) {
        throw std::invalid_argument("a state under a prompt that is not there");
      }
    }
  }
  return {states, observations.data(), times.data(), prompt_of ? prompt_of->data() : nullptr,
          keys ? keys->data() : nullptr};
}

void run_context(const std::shared_ptr<Prompts>& self, const Floats& observations, const Indices& times,
                 const std::optional<Indices>& prompt_of, Floats& condition, int threads) {
  const Prompts& prompts = held(self);
  const llmdpd::ActingBatch batch = batch_of(prompts, observations, times, prompt_of, nullptr, threads);
  require_shape(condition, {batch.states, prompts.context().net().output_dim}, "condition");
  float* out = condition.mutable_data();
  py::gil_scoped_release unlocked;
  llmdpd::run_context(prompts, batch, threads, out);
}

void act(const std::shared_ptr<Prompts>& self, const std::shared_ptr<llmdpd::Sampler>& sampler,
         const std::shared_ptr<llmdpd::Actor>& actor, const Floats& observations, const Indices& times,
         const std::optional<Indices>& prompt_of, const Keys& keys, Floats& actions, int threads) {
  const Prompts& prompts = held(self);
  const llmdpd::NetDims& dims = held(sampler).net().dims;
  if (dims.state != prompts.context().net().output_dim || dims.prompt != prompts.prompt_dim()) {
    throw std::invalid_argument("the sampler is of other sizes than the context");
  }
  if (actor && &actor->sampler() != sampler.get()) throw std::invalid_argument("the actor has another sampler");
  const llmdpd::ActingBatch batch = batch_of(prompts, observations, times, prompt_of, &keys, threads);
  require_shape(actions, {batch.states, dims.action}, "actions");
  float* out = actions.mutable_data();
  py::gil_scoped_release unlocked;
  llmdpd::act(prompts, *sampler, actor.get(), batch, threads, out);
}

void read_features(const std::shared_ptr<Context>& self, const Floats& observations, Floats& own, Floats& geometry,
                   int threads) {
  const Context& context = held(self);
  if (observations.ndim() != 2) throw std::invalid_argument("wrong shape: observations");
  if (threads < 1) throw std::invalid_argument("threads start at 1");
  const py::ssize_t rows = observations.shape(0);
  if (rows > kMaxStates) throw std::invalid_argument("too many states for one call");
  require_shape(observations, {rows, context.net().state_dim}, "observations");
  require_shape(own, {rows, context.net().own.count}, "features");
  require_shape(geometry, {rows, context.net().geometry.count}, "geometry");
  float *features = own.mutable_data(), *places = geometry.mutable_data();
  py::gil_scoped_release unlocked;
  llmdpd::read_features(context, rows, observations.data(), threads, features, places);
}

}  // namespace

void bind_context(py::module_& module) {
  py::class_<Context, std::shared_ptr<Context>>(module, "Context", "A context's weights, packed as they are now.")
      .def(py::init(&make_context), py::arg("state_dim"), py::arg("action_dim"), py::arg("lookaheads"),
           py::arg("heads"), py::arg("points"), py::arg("own").noconvert(), py::arg("geometry").noconvert(), py::arg("periods"),
           py::arg("time_unit"), py::arg("weights").noconvert())
      .def("features", &read_features, py::arg("observations").noconvert(), py::arg("own").noconvert(),
           py::arg("geometry").noconvert(), py::arg("threads"));
  py::class_<Prompts, std::shared_ptr<Prompts>>(module, "Prompts", "Prompts as a context looks them up.")
      .def(py::init(&make_prompts), py::arg("context").none(false), py::arg("pooled").noconvert(), py::arg("memory").noconvert())
      .def("condition", &run_context, py::arg("observations").noconvert(), py::arg("times").noconvert(),
           py::arg("prompt_of").noconvert(), py::arg("condition").noconvert(), py::arg("threads"))
      .def("act", &act, py::arg("sampler"), py::arg("actor"), py::arg("observations").noconvert(),
           py::arg("times").noconvert(), py::arg("prompt_of").noconvert(), py::arg("keys").noconvert(),
           py::arg("actions").noconvert(), py::arg("threads"));
}
