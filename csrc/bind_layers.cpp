#include <pybind11/stl.h>

#include "bindings.h"
#include "dispatch.h"
#include "layers.h"

namespace {

using llmdpd::AttentionInputs;
using llmdpd::LinearInputs;
using llmdpd::LinearTarget;
using llmdpd::Norm;
using llmdpd::NormTarget;
using llmdpd::RetrievalCall;
using FloatsList = std::vector<Floats>;

llmdpd::LayerTools tools_for(int threads) {
  if (threads < 1) throw std::invalid_argument("threads start at 1");
  return {llmdpd::active_kernels(false), llmdpd::active_layers(), threads};
}

// Memory for what is kept, of the very size: what was kept by another instruction set is laid out in another way.
float* memory_of(Floats& array, std::size_t floats, const char* name) {
  if (array.ndim() != 1 || static_cast<std::size_t>(array.size()) != floats) {
    throw std::invalid_argument(std::string("wrong shape: ") + name);
  }
  require_shape(array, {array.size()}, name);  // aligned, that is
  return array.mutable_data();
}

float* target(Floats& array, const std::vector<py::ssize_t>& shape, const char* name) {
  require_shape(array, shape, name);
  return array.mutable_data();
}

Norm norm_of(const FloatsList& norm, int width) {
  if (norm.empty()) return {nullptr, nullptr};
  if (norm.size() != 2) throw std::invalid_argument("wrong number: a norm has weight and bias");
  require_shape(norm[0], {width}, "norm weight");
  require_shape(norm[1], {width}, "norm bias");
  return {norm[0].data(), norm[1].data()};
}

// A weight whose rows may lie apart, and a bias.
llmdpd::Linear linear_of(const Strided& weight, const Floats& bias, int inputs) {
  const llmdpd::Matrix matrix = matrix_of(weight, "weight");
  if (matrix.inputs != inputs || matrix.outputs < 1) throw std::invalid_argument("wrong shape: weight");
  require_shape(bias, {matrix.outputs}, "bias");
  return {matrix, bias.data()};
}

LinearInputs linear_inputs(const Floats& x, const FloatsList& norm, const std::vector<Strided>& weights,
                           const FloatsList& biases) {
  if (x.ndim() != 2 || x.shape(1) < 1 || (weights.empty() && norm.empty()) || weights.size() != biases.size()) {
    throw std::invalid_argument("wrong shape: x, or another number of weights than of biases");
  }
  require_shape(x, {x.shape(0), x.shape(1)}, "x");
  const int inputs = small(x.shape(1), "inputs");
  LinearInputs in{x.shape(0), inputs, x.data(), norm_of(norm, inputs), {}};
  for (std::size_t i = 0; i < weights.size(); ++i) in.layers.push_back(linear_of(weights[i], biases[i], inputs));
  return in;
}

// Of each result: the layers', or the one of the norm alone.
std::vector<int> widths_of(const LinearInputs& in) {
  std::vector<int> widths;
  for (const llmdpd::Linear& layer : in.layers) widths.push_back(layer.weight.outputs);
  if (widths.empty()) widths.push_back(in.inputs);
  return widths;
}

std::size_t linear_tape(py::ssize_t rows, int inputs, bool norm) {
  if (rows < 0 || inputs < 1) throw std::invalid_argument("sizes of a tape start at 1");
  return llmdpd::linear_tape_floats(rows, inputs, norm, tools_for(1));
}

void linear_forward(const Floats& x, const FloatsList& norm, const std::vector<Strided>& weights,
                    const FloatsList& biases, FloatsList& out, Floats& tape, int threads) {
  const LinearInputs in = linear_inputs(x, norm, weights, biases);
  const llmdpd::LayerTools tools = tools_for(threads);
  const std::vector<int> widths = widths_of(in);
  if (out.size() != widths.size()) throw std::invalid_argument("wrong number: results");
  std::vector<float*> results;
  for (std::size_t i = 0; i < out.size(); ++i) results.push_back(target(out[i], {in.rows, widths[i]}, "result"));
  float* kept = memory_of(tape, llmdpd::linear_tape_floats(in.rows, in.inputs, !norm.empty(), tools), "tape");
  py::gil_scoped_release unlocked;
  llmdpd::linear_forward(in, results, kept, tools);
}

void linear_backward(const Floats& x, const FloatsList& norm, const std::vector<Strided>& weights,
                     const FloatsList& biases, const FloatsList& d_out, Floats& tape, std::optional<Floats>& d_x,
                     FloatsList& d_norm, FloatsList& d_weights, FloatsList& d_biases, int threads) {
  const LinearInputs in = linear_inputs(x, norm, weights, biases);
  const llmdpd::LayerTools tools = tools_for(threads);
  const std::size_t count = in.layers.size();
  const std::vector<int> widths = widths_of(in);
  if (d_out.size() != widths.size() || d_weights.size() != count || d_biases.size() != count || d_norm.size() != norm.size()) {
    throw std::invalid_argument("wrong number: gradients");
  }
  if (!norm.empty() && !d_x) throw std::invalid_argument("the norm's gradients come with that of x");
  std::vector<const float*> grads;
  std::vector<LinearTarget> targets;
  for (std::size_t i = 0; i < widths.size(); ++i) {
    require_shape(d_out[i], {in.rows, widths[i]}, "gradient");
    grads.push_back(d_out[i].data());
  }
  for (std::size_t i = 0; i < count; ++i) {
    targets.push_back({target(d_weights[i], {widths[i], in.inputs}, "weight's gradient"),
                       target(d_biases[i], {widths[i]}, "bias's gradient")});
  }
  NormTarget of_norm{};
  if (!d_norm.empty()) {
    of_norm = {target(d_norm[0], {in.inputs}, "norm's gradient"), target(d_norm[1], {in.inputs}, "norm's gradient")};
  }
  float* of_x = d_x ? target(*d_x, {in.rows, in.inputs}, "gradient of x") : nullptr;
  float* kept = memory_of(tape, llmdpd::linear_tape_floats(in.rows, in.inputs, !norm.empty(), tools), "tape");
  py::gil_scoped_release unlocked;
  llmdpd::linear_backward(in, grads, kept, of_x, of_norm, targets, tools);
}

// hidden [G, M, W]; key and value [G, T, W]; bias [G, T]; weights: the two norms, then query, out, widen, narrow.
AttentionInputs attention_inputs(const Floats& hidden, const Floats& key, const Floats& value, const Floats& bias,
                                 int heads, const std::vector<Strided>& weights) {
  if (hidden.ndim() != 3 || key.ndim() != 3 || weights.size() != 12) throw std::invalid_argument("wrong shape: attention");
  const py::ssize_t groups = hidden.shape(0), rows = hidden.shape(1), width = hidden.shape(2), steps = key.shape(1);
  if (heads < 1 || width < 1 || width % heads != 0 || steps < 1) throw std::invalid_argument("wrong sizes: attention");
  require_shape(hidden, {groups, rows, width}, "hidden");
  require_shape(key, {groups, steps, width}, "key");
  require_shape(value, {groups, steps, width}, "value");
  require_shape(bias, {groups, steps}, "bias");
  if (weights[8].ndim() != 2) throw std::invalid_argument("wrong shape: weight");
  const int w = small(width, "width"), wide = small(weights[8].shape(0), "width of the feed-forward");
  const auto vector = [&](int i, int length) {
    const Strided& array = weights[i];
    require_shape(array, {length}, "norm or bias");
    if (length > 1 && array.strides(0) != static_cast<py::ssize_t>(sizeof(float))) {
      throw std::invalid_argument("not contiguous: norm or bias");
    }
    return array.data();
  };
  const auto linear = [&](int i, int outputs, int inputs) {
    const llmdpd::Matrix matrix = matrix_of(weights[i], "weight");
    if (matrix.outputs != outputs || matrix.inputs != inputs) throw std::invalid_argument("wrong shape: weight");
    return llmdpd::Linear{matrix, vector(i + 1, outputs)};
  };
  return {small(groups, "groups"), small(rows, "rows"), small(steps, "steps"), w, wide, heads,
          hidden.data(),           key.data(),          value.data(),          bias.data(),
          {vector(0, w), vector(1, w)},
          {vector(2, w), vector(3, w)},
          linear(4, w, w),
          linear(6, w, w),
          linear(8, wide, w),
          linear(10, w, wide)};
}

std::size_t attention_tape(int groups, int rows, int steps, int width, int wide, int heads) {
  if (groups < 0 || rows < 0 || steps < 1 || width < 1 || wide < 1 || heads < 1) throw std::invalid_argument("wrong sizes: tape");
  AttentionInputs in{};
  in.groups = groups, in.rows = rows, in.steps = steps, in.width = width, in.wide = wide, in.heads = heads;
  return llmdpd::attention_tape_floats(in, tools_for(1));
}

void attention_forward(const Floats& hidden, const Floats& key, const Floats& value, const Floats& bias, int heads,
                       const std::vector<Strided>& weights, Floats& out, Floats& tape, int threads) {
  const AttentionInputs in = attention_inputs(hidden, key, value, bias, heads, weights);
  const llmdpd::LayerTools tools = tools_for(threads);
  float* results = target(out, {in.groups, in.rows, in.width}, "result");
  float* kept = memory_of(tape, llmdpd::attention_tape_floats(in, tools), "tape");
  py::gil_scoped_release unlocked;
  llmdpd::attention_forward(in, results, kept, tools);
}

void attention_backward(const Floats& hidden, const Floats& key, const Floats& value, const Floats& bias, int heads,
                        const std::vector<Strided>& weights, const Floats& d_out, Floats& tape, FloatsList& gradients,
                        int threads) {
  const AttentionInputs in = attention_inputs(hidden, key, value, bias, heads, weights);
  const llmdpd::LayerTools tools = tools_for(threads);
  require_shape(d_out, {in.groups, in.rows, in.width}, "gradient");
  if (gradients.size() != 15) throw std::invalid_argument("wrong number: gradients");
  const int w = in.width;
  const auto vector = [&](int i, int length) { return target(gradients[i], {length}, "gradient of a norm or bias"); };
  const auto linear = [&](int i, int outputs, int inputs) {
    return LinearTarget{target(gradients[i], {outputs, inputs}, "weight's gradient"), vector(i + 1, outputs)};
  };
  const llmdpd::AttentionTargets targets{target(gradients[0], {in.groups, in.rows, w}, "gradient of hidden"),
                                         target(gradients[1], {in.groups, in.steps, w}, "gradient of key"),
                                         target(gradients[2], {in.groups, in.steps, w}, "gradient of value"),
                                         {vector(3, w), vector(4, w)},
                                         {vector(5, w), vector(6, w)},
                                         linear(7, w, w),
                                         linear(9, w, w),
                                         linear(11, in.wide, w),
                                         linear(13, w, in.wide)};
  float* kept = memory_of(tape, llmdpd::attention_tape_floats(in, tools), "tape");
  py::gil_scoped_release unlocked;
  llmdpd::attention_backward(in, d_out.data(), kept, targets, tools);
}

// query [G, M, W]; key [G, T, W]; bias [G, T]; here [G, M, C]; there [G, T, C] and similarity [heads, C], or neither;
// waypoints [G, T, A + L G].
RetrievalCall retrieval_call(const Floats& query, const Floats& key, const Floats& bias, const Floats& here,
                             const std::optional<Floats>& there, const std::optional<Floats>& similarity,
                             const Floats& waypoints, int heads, int action_dim, int geometry) {
  if (query.ndim() != 3 || key.ndim() != 3 || here.ndim() != 3 || waypoints.ndim() != 3) {
    throw std::invalid_argument("wrong shape: retrieval");
  }
  const py::ssize_t groups = query.shape(0), rows = query.shape(1), width = query.shape(2), steps = key.shape(1);
  const py::ssize_t compared = here.shape(2), found = waypoints.shape(2);
  const py::ssize_t far = found - action_dim;  // none where observations have no geometry
  if (heads < 1 || width < 1 || width % heads != 0 || steps < 1 || action_dim < 0 || geometry < 0 ||
      geometry > compared || far < 0 || found < 1 || (geometry > 0 ? far % geometry != 0 : far != 0)) {
    throw std::invalid_argument("wrong sizes: retrieval");
  }
  require_shape(query, {groups, rows, width}, "query");
  require_shape(key, {groups, steps, width}, "key");
  require_shape(bias, {groups, steps}, "bias");
  require_shape(here, {groups, rows, compared}, "here");
  require_shape(waypoints, {groups, steps, found}, "waypoints");
  if (there.has_value() != similarity.has_value()) throw std::invalid_argument("similarity needs moments to compare with");
  if (there) require_shape(*there, {groups, steps, compared}, "there");
  if (similarity) require_shape(*similarity, {heads, compared}, "similarity");
  RetrievalCall call{};
  call.groups = small(groups, "groups"), call.rows = small(rows, "rows"), call.steps = small(steps, "steps");
  call.width = small(width, "width"), call.heads = heads, call.action_dim = action_dim, call.geometry = geometry;
  call.compared = small(compared, "compared");
  call.lookaheads = geometry > 0 ? small(far / geometry, "waypoints") : 0;
  call.query = query.data(), call.key = key.data(), call.bias = bias.data(), call.here = here.data();
  call.there = there ? there->data() : nullptr, call.similarity = similarity ? similarity->data() : nullptr;
  call.waypoints = waypoints.data();
  return call;
}

std::size_t retrieval_tape(py::ssize_t rows, int steps, int heads) {
  if (rows < 0 || steps < 1 || heads < 1) throw std::invalid_argument("wrong sizes: tape");
  RetrievalCall call{};
  call.groups = 1, call.rows = small(rows, "rows"), call.steps = steps, call.heads = heads;
  return llmdpd::retrieval_tape_floats(call, tools_for(1));
}

void retrieval_forward(const Floats& query, const Floats& key, const Floats& bias, const Floats& here,
                       const std::optional<Floats>& there, const std::optional<Floats>& similarity,
                       const Floats& waypoints, int heads, int action_dim, int geometry, Floats& out, Floats& tape,
                       int threads) {
  RetrievalCall call =
      retrieval_call(query, key, bias, here, there, similarity, waypoints, heads, action_dim, geometry);
  const llmdpd::LayerTools tools = tools_for(threads);
  call.out = target(out, {call.groups, call.rows, call.out_dim()}, "result");
  float* kept = memory_of(tape, llmdpd::retrieval_tape_floats(call, tools), "tape");
  py::gil_scoped_release unlocked;
  llmdpd::retrieval_forward(call, kept, tools);
}

void retrieval_backward(const Floats& query, const Floats& key, const Floats& bias, const Floats& here,
                        const std::optional<Floats>& there, const std::optional<Floats>& similarity,
                        const Floats& waypoints, int heads, int action_dim, int geometry, Floats& out,
                        const Floats& d_out, Floats& tape, Floats& d_query, Floats& d_key,
                        std::optional<Floats>& d_similarity, int threads) {
  RetrievalCall call =
      retrieval_call(query, key, bias, here, there, similarity, waypoints, heads, action_dim, geometry);
  const llmdpd::LayerTools tools = tools_for(threads);
  call.out = target(out, {call.groups, call.rows, call.out_dim()}, "result");
  require_shape(d_out, {call.groups, call.rows, call.out_dim()}, "gradient");
  if (d_similarity.has_value() != similarity.has_value()) throw std::invalid_argument("wrong number: gradients");
  float* of_query = target(d_query, {call.groups, call.rows, call.width}, "gradient of the query");
  float* of_key = target(d_key, {call.groups, call.steps, call.width}, "gradient of the key");
  float* of_similarity = d_similarity ? target(*d_similarity, {heads, call.compared}, "gradient of the similarity") : nullptr;
  float* kept = memory_of(tape, llmdpd::retrieval_tape_floats(call, tools), "tape");
  py::gil_scoped_release unlocked;
  llmdpd::retrieval_backward(call, d_out.data(), kept, of_query, of_key, of_similarity, tools);
}

}  // namespace

void bind_layers(py::module_& module) {
  module.def("linear_tape", &linear_tape, py::arg("rows"), py::arg("inputs"), py::arg("norm"));
  module.def("linear_forward", &linear_forward, py::arg("x").noconvert(), py::arg("norm").noconvert(),
             py::arg("weights").noconvert(), py::arg("biases").noconvert(), py::arg("out").noconvert(),
             py::arg("tape").noconvert(), py::arg("threads"));
  module.def("linear_backward", &linear_backward, py::arg("x").noconvert(), py::arg("norm").noconvert(),
             py::arg("weights").noconvert(), py::arg("biases").noconvert(), py::arg("d_out").noconvert(),
             py::arg("tape").noconvert(), py::arg("d_x").noconvert(), py::arg("d_norm").noconvert(),
             py::arg("d_weights").noconvert(), py::arg("d_biases").noconvert(), py::arg("threads"));
  module.def("attention_tape", &attention_tape, py::arg("groups"), py::arg("rows"), py::arg("steps"),
             py::arg("width"), py::arg("wide"), py::arg("heads"));
  module.def("attention_forward", &attention_forward, py::arg("hidden").noconvert(), py::arg("key").noconvert(),
             py::arg("value").noconvert(), py::arg("bias").noconvert(), py::arg("heads"),
             py::arg("weights").noconvert(), py::arg("out").noconvert(), py::arg("tape").noconvert(),
             py::arg("threads"));
  module.def("attention_backward", &attention_backward, py::arg("hidden").noconvert(), py::arg("key").noconvert(),
             py::arg("value").noconvert(), py::arg("bias").noconvert(), py::arg("heads"),
             py::arg("weights").noconvert(), py::arg("d_out").noconvert(), py::arg("tape").noconvert(),
             py::arg("gradients").noconvert(), py::arg("threads"));
  module.def("retrieval_tape", &retrieval_tape, py::arg("rows"), py::arg("steps"), py::arg("heads"));
  module.def("retrieval_forward", &retrieval_forward, py::arg("query").noconvert(), py::arg("key").noconvert(),
             py::arg("bias").noconvert(), py::arg("here").noconvert(), py::arg("there").noconvert(),
             py::arg("similarity").noconvert(), py::arg("waypoints").noconvert(), py::arg("heads"),
             py::arg("action_dim"), py::arg("geometry"), py::arg("out").noconvert(), py::arg("tape").noconvert(),
             py::arg("threads"));
  module.def("retrieval_backward", &retrieval_backward, py::arg("query").noconvert(), py::arg("key").noconvert(),
             py::arg("bias").noconvert(), py::arg("here").noconvert(), py::arg("there").noconvert(),
             py::arg("similarity").noconvert(), py::arg("waypoints").noconvert(), py::arg("heads"),
             py::arg("action_dim"), py::arg("geometry"), py::arg("out").noconvert(), py::arg("d_out").noconvert(),
             py::arg("tape").noconvert(), py::arg("d_query").noconvert(), py::arg("d_key").noconvert(),
             py::arg("d_similarity").noconvert(), py::arg("threads"));
}
