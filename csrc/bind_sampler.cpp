#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#include "bindings.h"
#include "actor.h"
#include "dispatch.h"
#include "sampler.h"

namespace {

using llmdpd::NetDims;
using llmdpd::PackedNet;
using llmdpd::Sampler;

constexpr std::int64_t kMaxRows = std::int64_t{1} << 32;  // the row is one word of the noise's counter

std::shared_ptr<PackedNet> make_packed_net(int action_dim, int time_dim, const Floats& first_weight,
                                           const Floats& first_bias, const std::vector<Floats>& trunk, int state_dim,
                                           bool bf16) {
  const llmdpd::TrunkWeights weights = trunk_of(trunk);
  if (first_weight.ndim() != 2) throw std::invalid_argument("wrong shape: first weight");
  const int inputs = small(first_weight.shape(1), "first weight");
  const int prompt_dim = inputs - action_dim - time_dim - state_dim;
  if (action_dim != weights.outputs || time_dim < 0 || state_dim < 0 || prompt_dim < 0) {
    throw std::invalid_argument("wrong sizes of the first layer's parts");
  }
  require_shape(first_weight, {weights.hidden, inputs}, "first weight");
  require_shape(first_bias, {weights.hidden}, "first bias");
  const NetDims dims{action_dim, time_dim, state_dim, prompt_dim, weights.hidden};
  return std::make_shared<PackedNet>(dims, first_weight.data(), first_bias.data(), weights,
                                     llmdpd::active_kernels(bf16));
}

std::shared_ptr<Sampler> make_sampler(std::shared_ptr<PackedNet> net, const Floats& table, const Floats& time_embedding,
                                      float start, float clip) {
  if (table.ndim() != 2) throw std::invalid_argument("wrong shape: table");
  const py::ssize_t steps = table.shape(0);
  require_shape(table, {steps, 6}, "table");
  require_shape(time_embedding, {steps, net->dims.time}, "time embedding");
  static_assert(sizeof(llmdpd::StepCoefficients) == 6 * sizeof(float), "rows of the table are read in place");
  const auto* rows = reinterpret_cast<const llmdpd::StepCoefficients*>(table.data());
  return std::make_shared<Sampler>(std::move(net), std::vector<llmdpd::StepCoefficients>(rows, rows + steps),
                                   time_embedding.data(), start, clip);
}

void run(const std::shared_ptr<Sampler>& self, const Floats& state, const Floats& prompt, std::int64_t samples,
         const Keys& keys, const std::optional<Floats>& noise, Floats& actions, int threads) {
  const Sampler& sampler = held(self);
  const NetDims& dims = sampler.net().dims;
  if (state.ndim() != 2 || prompt.ndim() < 1 || prompt.ndim() > 2 || keys.ndim() != 1) {
    throw std::invalid_argument("wrong shape: number of dimensions");
  }
  const py::ssize_t states = state.shape(0);
  if (samples < 1 || threads < 1) throw std::invalid_argument("samples and threads start at 1");
  if (samples > kMaxRows || states > kMaxRows / samples) throw std::invalid_argument("too many rows for one call");
  const py::ssize_t rows = states * samples;
  require_shape(state, {states, dims.state}, "state");
  if (prompt.ndim() == 2) {
    require_shape(prompt, {states, dims.prompt}, "prompt");
  } else {
    require_shape(prompt, {dims.prompt}, "prompt");
  }
  if (noise) require_shape(*noise, {sampler.steps() + 1, rows, dims.action}, "noise");
  const bool key_per_state = keys.shape(0) != 1 || states == 1;
  require_shape(keys, {key_per_state ? states : 1}, "keys");
  require_shape(actions, {rows, dims.action}, "actions");
  const llmdpd::SamplerBatch batch{states,
                                   small(samples, "samples"),
                                   state.data(),
                                   prompt.data(),
                                   prompt.ndim() == 2,
                                   {noise ? noise->data() : nullptr, keys.data(), key_per_state}};
  float* out = actions.mutable_data();
  py::gil_scoped_release unlocked;
  sampler.run(batch, threads, out);
}

std::shared_ptr<llmdpd::PackedCritic> make_critic(int state_dim, int action_dim, const Floats& first_weight,
                                                  const Floats& first_bias, const std::vector<Floats>& trunk,
                                                  bool bf16) {
  const llmdpd::TrunkWeights weights = trunk_of(trunk);
  if (first_weight.ndim() != 2) throw std::invalid_argument("wrong shape: first weight");
  const int inputs = small(first_weight.shape(1), "first weight"), prompt_dim = inputs - state_dim - action_dim;
  if (state_dim < 0 || action_dim < 0 || prompt_dim < 0 || weights.outputs != 1) {
    throw std::invalid_argument("wrong sizes of the critic");
  }
  require_shape(first_weight, {weights.hidden, inputs}, "first weight");
  require_shape(first_bias, {weights.hidden}, "first bias");
  return std::make_shared<llmdpd::PackedCritic>(state_dim, action_dim, prompt_dim, first_weight.data(),
                                                first_bias.data(), weights, llmdpd::active_kernels(bf16));
}

std::shared_ptr<llmdpd::Actor> make_actor(std::shared_ptr<Sampler> sampler, std::shared_ptr<llmdpd::PackedCritic> q1,
                                          std::shared_ptr<llmdpd::PackedCritic> q2, int samples, bool soft,
                                          double temperature) {
  const NetDims& dims = sampler->net().dims;
  for (const auto& critic : {q1, q2}) {
    if (critic->state_dim != dims.state || critic->action_dim != dims.action ||
        (critic->prompt_dim != 0 && critic->prompt_dim != dims.prompt)) {
      throw std::invalid_argument("the critics are of other sizes than the sampler");
    }
  }
  if (samples < 1 || !(temperature > 0)) throw std::invalid_argument("samples start at 1, the temperature above 0");
  return std::make_shared<llmdpd::Actor>(std::move(sampler), std::move(q1), std::move(q2), samples,
                                         llmdpd::Selection{soft, temperature});
}

void act(const std::shared_ptr<llmdpd::Actor>& self, const Floats& state, const Floats& prompt, const Keys& keys,
         Floats& actions, int threads) {
  const llmdpd::Actor& actor = held(self);
  const NetDims& dims = actor.sampler().net().dims;
  if (state.ndim() != 2 || prompt.ndim() < 1 || prompt.ndim() > 2)
    throw std::invalid_argument("wrong shape: state or prompt");
  if (threads < 1) throw std::invalid_argument("threads start at 1");
  const py::ssize_t states = state.shape(0);
  require_shape(state, {states, dims.state}, "state");
  const bool per_state = prompt.ndim() == 2;
  require_shape(prompt,
                per_state ? std::vector<py::ssize_t>{states, dims.prompt} : std::vector<py::ssize_t>{dims.prompt},
                "prompt");
  require_shape(keys, {states}, "keys");
  require_shape(actions, {states, dims.action}, "actions");
  float* out = actions.mutable_data();
  py::gil_scoped_release unlocked;
  actor.act(states, state.data(), prompt.data(), per_state, keys.data(), threads, out);
}

// A module's tensors as they are now: arrays that share their memory and keep it from being given to others, and a
// copy of their bytes. Comparing with it reads all bytes: no way to write into a tensor escapes it.
class Snapshot {
 public:
  explicit Snapshot(std::vector<py::array> arrays) : arrays_(std::move(arrays)) {
    for (const py::array& array : arrays_) {
      if (!(array.flags() & py::array::c_style)) throw std::invalid_argument("not contiguous: an array to be copied");
      if (array.dtype().attr("hasobject").cast<bool>()) throw std::invalid_argument("wrong dtype: objects");
      const auto* bytes = static_cast<const char*>(array.data());
      copies_.emplace_back(bytes, bytes + array.nbytes());
    }
  }

  bool unchanged() const {
    for (std::size_t i = 0; i < arrays_.size(); ++i) {
      // The size too: numpy can be made to resize an array that others hold.
      const std::vector<char>& copy = copies_[i];
      if (static_cast<std::size_t>(arrays_[i].nbytes()) != copy.size()) return false;
      if (!copy.empty() && std::memcmp(arrays_[i].data(), copy.data(), copy.size()) != 0) return false;
    }
    return true;
  }

 private:
  std::vector<py::array> arrays_;
  std::vector<std::vector<char>> copies_;
};

// Whether every watched thing is still where it was: tuples (dict, name, thing), of tensors also with their pointer, or
// pointer and strides, behind. Asked at every call of a sampler that may take 30 microseconds: hence the C API.
bool all_in_place(const py::tuple& watched) {
  static PyObject* const pointer_name = PyUnicode_InternFromString("data_ptr");
  static PyObject* const strides_name = PyUnicode_InternFromString("stride");
  const auto returns = [](PyObject* thing, PyObject* method, PyObject* expected) {
    PyObject* found = PyObject_CallMethodNoArgs(thing, method);
    if (!found) throw py::error_already_set();
    const int same = PyObject_RichCompareBool(found, expected, Py_EQ);
    Py_DECREF(found);
    if (same < 0) throw py::error_already_set();
    return same == 1;
  };
  for (py::ssize_t i = 0; i < PyTuple_GET_SIZE(watched.ptr()); ++i) {
    PyObject* item = PyTuple_GET_ITEM(watched.ptr(), i);
    const py::ssize_t size = PyTuple_Check(item) ? PyTuple_GET_SIZE(item) : 0;
    if (size < 3 || size > 5 || !PyDict_Check(PyTuple_GET_ITEM(item, 0))) {
      throw std::invalid_argument("wrong kind: what is watched are tuples (dict, name, thing, …)");
    }
    PyObject* thing = PyTuple_GET_ITEM(item, 2);
    if (PyDict_GetItem(PyTuple_GET_ITEM(item, 0), PyTuple_GET_ITEM(item, 1)) != thing) return false;
    if (size > 3 && !returns(thing, pointer_name, PyTuple_GET_ITEM(item, 3))) return false;
    if (size > 4 && !returns(thing, strides_name, PyTuple_GET_ITEM(item, 4))) return false;
  }
  return true;
}

}  // namespace

void bind_sampler(py::module_& module) {
  module.def("all_in_place", &all_in_place, py::arg("watched"));
  py::class_<Snapshot, std::shared_ptr<Snapshot>>(module, "Snapshot", "Arrays as they are now.")
      .def(py::init<std::vector<py::array>>(), py::arg("arrays"))
      .def("unchanged", [](const std::shared_ptr<Snapshot>& self) { return held(self).unchanged(); },
           "Whether every byte still is.");
  py::class_<PackedNet, std::shared_ptr<PackedNet>>(module, "PackedNet",
                                                    "A noise network's weights, packed as they are now.")
      .def(py::init(&make_packed_net), py::arg("action_dim"), py::arg("time_dim"), py::arg("first_weight").noconvert(),
           py::arg("first_bias").noconvert(), py::arg("trunk").noconvert(), py::arg("state_dim"), py::arg("bf16"));
  py::class_<Sampler, std::shared_ptr<Sampler>>(module, "Sampler", "A sampler's table bound to a packed network.")
      .def(py::init(&make_sampler), py::arg("net").none(false), py::arg("table").noconvert(),
           py::arg("time_embedding").noconvert(), py::arg("start"), py::arg("clip"))
      .def("run", &run, py::arg("state").noconvert(), py::arg("prompt").noconvert(), py::arg("samples"),
           py::arg("keys").noconvert(), py::arg("noise").noconvert(), py::arg("actions").noconvert(),
           py::arg("threads"));
  py::class_<llmdpd::PackedCritic, std::shared_ptr<llmdpd::PackedCritic>>(module, "PackedCritic",
                                                                          "A critic's weights, packed as they are now.")
      .def(py::init(&make_critic), py::arg("state_dim"), py::arg("action_dim"), py::arg("first_weight").noconvert(),
           py::arg("first_bias").noconvert(), py::arg("trunk").noconvert(), py::arg("bf16"));
  py::class_<llmdpd::Actor, std::shared_ptr<llmdpd::Actor>>(module, "Actor", "One action a state, by two critics.")
      .def(py::init(&make_actor), py::arg("sampler").none(false), py::arg("q1").none(false),
           py::arg("q2").none(false), py::arg("samples"), py::arg("soft"), py::arg("temperature"))
      .def("act", &act, py::arg("state").noconvert(), py::arg("prompt").noconvert(), py::arg("keys").noconvert(),
           py::arg("actions").noconvert(), py::arg("threads"));
}
