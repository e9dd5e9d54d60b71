#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "dispatch.h"
#include "optimizer.h"
#include "bind_prepared.h"
#include "sampler.h"
#include "thread_pool.h"

namespace {

using llmdpd::Numbers;
using Doubles = py::array_t<double, py::array::c_style>;
using FloatsList = std::vector<Floats>;
using Calls = std::shared_ptr<PreparedCalls>;

// Tensors of the same shapes; what is not there is null.
std::vector<Numbers> numbers_of(FloatsList& to, const FloatsList& from, FloatsList* means, FloatsList* squares) {
  for (const FloatsList* list : {&from, const_cast<const FloatsList*>(means), const_cast<const FloatsList*>(squares)}) {
    if (list && list->size() != to.size()) throw std::invalid_argument("wrong number of tensors");
  }
  std::vector<Numbers> tensors;
  for (std::size_t i = 0; i < to.size(); ++i) {
    const std::vector<py::ssize_t> shape(to[i].shape(), to[i].shape() + to[i].ndim());
    require_shape(to[i], shape, "weights");
    require_shape(from[i], shape, "gradients or sources");
    if (means) require_shape((*means)[i], shape, "means");
    if (squares) require_shape((*squares)[i], shape, "squares");
    tensors.push_back({to[i].size(), from[i].data(), means ? (*means)[i].mutable_data() : nullptr,
                       squares ? (*squares)[i].mutable_data() : nullptr, to[i].mutable_data()});
  }
  return tensors;
}

// `averages`: none, or those of the weights, which go after them by `average_rate` [1], read when it runs.
// `settings`: rate, beta1, beta2, epsilon, decay, the bound on the gradient's norm (0: none), and the step's number,
// read when it runs. `norm` [1] gets the gradient's before it is cut.
void add_step(const Calls& calls, FloatsList weights, FloatsList gradients, FloatsList means, FloatsList squares,
              Doubles settings, Floats norm, FloatsList averages, const std::optional<Doubles>& average_rate) {
  held(calls);
  std::vector<Numbers> tensors = numbers_of(weights, gradients, &means, &squares);
  if (!averages.empty()) {
    const std::vector<Numbers> moved = numbers_of(averages, weights, nullptr, nullptr);
    for (std::size_t i = 0; i < moved.size(); ++i) tensors[i].average = moved[i].to;
  }
  if (averages.empty() == average_rate.has_value()) throw std::invalid_argument("wrong kind: average_rate");
  if (average_rate) require_shape(*average_rate, {1}, "average_rate");
  require_shape(settings, {7}, "settings");
  require_shape(norm, {1}, "norm");
  const double* set = settings.data();
  const double* by = average_rate ? average_rate->data() : nullptr;
  float* to = norm.mutable_data();
  const llmdpd::LayerKernels& kernels = llmdpd::active_layers();
  calls->add(
      [tensors, set, by, to, &kernels](int threads) {
        const double length = std::sqrt(llmdpd::sum_of_squares(tensors, kernels, threads));
        const double share = set[5] != 0.0 ? set[5] / (length + 1e-6) : 1.0;
        *to = static_cast<float>(length);
        const llmdpd::AdamW of{static_cast<float>(set[0]),
                               static_cast<float>(set[1]),
                               static_cast<float>(set[2]),
                               static_cast<float>(set[3]),
                               static_cast<float>(set[4]),
                               static_cast<float>(1.0 - std::pow(set[1], set[6])),
                               static_cast<float>(1.0 - std::pow(set[2], set[6])),
                               static_cast<float>(share > 1.0 ? 1.0 : share)};
        llmdpd::adamw(of, tensors, kernels, threads, by ? static_cast<float>(*by) : 0.0f);
      },
      py::make_tuple(weights, gradients, means, squares, settings, norm, averages, average_rate));
}

// targets += rate (sources - targets); the rate [1] is read when it runs.
void add_average(const Calls& calls, FloatsList targets, FloatsList sources, Doubles rate) {
  held(calls);
  std::vector<Numbers> tensors = numbers_of(targets, sources, nullptr, nullptr);
  require_shape(rate, {1}, "rate");
  const double* by = rate.data();
  const llmdpd::LayerKernels& kernels = llmdpd::active_layers();
  calls->add([tensors, by, &kernels](
                 int threads) { llmdpd::average(static_cast<float>(*by), tensors, kernels, threads); },
             py::make_tuple(targets, sources, rate));
}

// A matrix whose rows are contiguous, to be written.
struct Target {
  float* data;
  std::ptrdiff_t stride;
};
Target target_of(Strided& array, const llmdpd::Matrix& like, const char* name) {
  const llmdpd::Matrix found = matrix_of(array, name);
  if (found.outputs != like.outputs || found.inputs != like.inputs) {
    throw std::invalid_argument(std::string("wrong shape: ") + name);
  }
  return {array.mutable_data(), found.stride};
}

// to = source, or to += source: matrices.
void add_copy(const Calls& calls, Strided to, const Strided& source, bool sum) {
  held(calls);
  const llmdpd::Matrix read = matrix_of(source, "source");
  const Target write = target_of(to, read, "to");
  calls->add(
      [read, write, sum](int) {
        for (std::ptrdiff_t r = 0; r < read.outputs; ++r) {
          const float* from = read.data + r * read.stride;
          float* target = write.data + r * write.stride;
          if (sum) {
            for (int c = 0; c < read.inputs; ++c) target[c] += from[c];
          } else {
            std::copy_n(from, read.inputs, target);
          }
        }
      },
      py::make_tuple(to, source));
}

// Actions [B, A] of states [B, S] under no prompt; the key [1] is read when it runs.
void add_sample(const Calls& calls, const std::shared_ptr<llmdpd::Sampler>& sampler, const Floats& state,
                const Keys& key, Floats actions) {
  held(calls);
  const llmdpd::NetDims& dims = held(sampler).net().dims;
  if (dims.prompt != 0) throw std::invalid_argument("wrong kind of network: it reads prompts");
  if (state.ndim() != 2) throw std::invalid_argument("wrong shape: state");
  const py::ssize_t states = state.shape(0);
  require_shape(state, {states, dims.state}, "state");
  require_shape(key, {1}, "key");
  require_shape(actions, {states, dims.action}, "actions");
  const llmdpd::SamplerBatch batch{states, 1, state.data(), state.data(), false, {nullptr, key.data(), states == 1}};
  float* out = actions.mutable_data();
  const llmdpd::Sampler* run = sampler.get();
  calls->add([batch, out, run](int threads) { run->run(batch, threads, out); },
             py::make_tuple(sampler, state, key, actions));
}

}  // namespace

void run_together(const std::vector<Calls>& members, int threads) {
  const int count = static_cast<int>(members.size());
  const int whole = count - (count < 4 * threads ? count % threads : 0);
  llmdpd::parallel_for(whole, threads, [&](int i) { members[i]->run(1); });
  for (int i = whole; i < count; ++i) members[i]->run(threads);
}

void bind_together(py::module_& module) {
  py::class_<PreparedCalls, Calls>(module, "PreparedCalls", "Calls of one learner, in their order; see bind_prepared.h.")
      .def(py::init<>());
  module.def("add_step", &add_step, py::arg("calls"), py::arg("weights").noconvert(), py::arg("gradients").noconvert(),
             py::arg("means").noconvert(), py::arg("squares").noconvert(), py::arg("settings").noconvert(),
             py::arg("norm").noconvert(), py::arg("averages").noconvert() = FloatsList{},
             py::arg("average_rate").noconvert() = std::nullopt);
  module.def("add_average", &add_average, py::arg("calls"), py::arg("targets").noconvert(),
             py::arg("sources").noconvert(), py::arg("rate").noconvert());
  module.def("add_copy", &add_copy, py::arg("calls"), py::arg("to").noconvert(), py::arg("source").noconvert(),
             py::arg("sum"));
  module.def("add_sample", &add_sample, py::arg("calls"), py::arg("sampler"), py::arg("state").noconvert(),
             py::arg("key").noconvert(), py::arg("actions").noconvert());
  module.def(
      "run_together",
      [](const std::vector<Calls>& members, int threads) {
        if (threads < 1) throw std::invalid_argument("threads start at 1");
        for (const Calls& member : members) held(member);
        py::gil_scoped_release unlocked;
        run_together(members, threads);
      },
      py::arg("members"), py::arg("threads"), "Run each member's calls; members run side by side.");
}
