#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
#include "philox.h"
#include "reverse_diffusion.h"

namespace py = pybind11;

namespace {

using Floats = py::array_t<float, py::array::c_style>;
using Keys = py::array_t<std::uint64_t, py::array::c_style>;

// llmdpd/diffusion/native.py gives users the readable errors; this is what keeps a wrong call from reading elsewhere.
void require_shape(const py::array& array, const std::vector<py::ssize_t>& shape, const char* name) {
  bool same = array.ndim() == static_cast<py::ssize_t>(shape.size());
  for (std::size_t i = 0; same && i < shape.size(); ++i) same = array.shape(static_cast<py::ssize_t>(i)) == shape[i];
  if (!same) throw std::invalid_argument(std::string("wrong shape: ") + name);
}

void reverse_diffusion(const std::array<Floats, 4>& weights, const std::array<Floats, 4>& biases,
                       const Floats& time_embedding, const Floats& table, float start, float clip, const Floats& state,
                       const Floats& prompt, int samples, const Keys& keys, const std::optional<Floats>& noise,
                       Floats& actions, int threads) {
  if (state.ndim() != 2 || time_embedding.ndim() != 2 || prompt.ndim() < 1 || prompt.ndim() > 2 || keys.ndim() != 1 ||
      weights[3].ndim() != 2) {
    throw std::invalid_argument("wrong number of dimensions");
  }
  if (samples < 1 || threads < 1) throw std::invalid_argument("samples and threads start at 1");
  const py::ssize_t states = state.shape(0), steps = time_embedding.shape(0), rows = states * samples;
  const py::ssize_t state_dim = state.shape(1), time_dim = time_embedding.shape(1);
  const py::ssize_t prompt_dim = prompt.shape(prompt.ndim() - 1);
  const py::ssize_t action_dim = weights[3].shape(0), hidden_dim = weights[3].shape(1);
  require_shape(weights[0], {hidden_dim, action_dim + time_dim + state_dim + prompt_dim}, "first weight");
  for (int layer = 1; layer < 3; ++layer) require_shape(weights[layer], {hidden_dim, hidden_dim}, "hidden weight");
  for (int layer = 0; layer < 4; ++layer) require_shape(biases[layer], {layer < 3 ? hidden_dim : action_dim}, "bias");
  if (hidden_dim < 1 || action_dim < 1) throw std::invalid_argument("hidden and action dimensions start at 1");
  require_shape(table, {steps, 6}, "table");
  if (prompt.ndim() == 2) require_shape(prompt, {states, prompt_dim}, "prompt");
  if (noise) require_shape(*noise, {steps + 1, rows, action_dim}, "noise");
  const bool key_per_state = keys.shape(0) != 1 || states == 1;
  if (key_per_state) require_shape(keys, {states}, "keys");
  require_shape(actions, {rows, action_dim}, "actions");

  llmdpd::Net net{static_cast<int>(action_dim), static_cast<int>(time_dim), static_cast<int>(state_dim),
                  static_cast<int>(prompt_dim), static_cast<int>(hidden_dim), {}, {}};
  for (int layer = 0; layer < 4; ++layer) {
    net.weight[layer] = weights[layer].data();
    net.bias[layer] = biases[layer].data();
  }
  static_assert(sizeof(llmdpd::StepCoefficients) == 6 * sizeof(float), "rows of the table are read in place");
  const llmdpd::Chain chain{static_cast<int>(steps), time_embedding.data(),
                            reinterpret_cast<const llmdpd::StepCoefficients*>(table.data()), start, clip};
  const llmdpd::Batch batch{states,
                            samples,
                            state.data(),
                            prompt.data(),
                            prompt.ndim() == 2,
                            noise ? noise->data() : nullptr,
                            keys.data(),
                            key_per_state};
  float* out = actions.mutable_data();
  const llmdpd::TileKernels& kernels = llmdpd::active_kernels();
  py::gil_scoped_release unlocked;
  llmdpd::reverse_diffusion(net, chain, batch, kernels, threads, out);
}

Floats philox_normal(std::uint64_t key, py::ssize_t rows, py::ssize_t draws, int action_dim) {
  Floats out({draws, rows, static_cast<py::ssize_t>(action_dim)});
  float* to = out.mutable_data();
  for (py::ssize_t draw = 0; draw < draws; ++draw) {
    for (py::ssize_t row = 0; row < rows; ++row, to += action_dim) {
      llmdpd::philox_normal(key, static_cast<std::uint32_t>(row), static_cast<std::uint32_t>(draw), action_dim, to);
    }
  }
  return out;
}

std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter, std::uint64_t key) {
  llmdpd::philox4x32(counter.data(), key);
  return counter;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "The reverse-diffusion sampler in C++; call it through llmdpd.diffusion.";
  module.attr("__version__") = LLMDPD_VERSION;
  module.attr("compiler") = LLMDPD_COMPILER;
  module.attr("flags") = LLMDPD_FLAGS;
  module.def("compiled_isas", &llmdpd::compiled_isas, "Instruction sets compiled in, slowest first.");
  module.def("runnable_isas", &llmdpd::runnable_isas, "Those of them that this CPU has.");
  module.def("active_isa", &llmdpd::active_isa);
  module.def("set_isa", &llmdpd::set_isa, py::arg("name"), "Use this instruction set; the best one for ''.");
  module.def("philox4x32", &philox4x32, py::arg("counter"), py::arg("key"));
  module.def("philox_normal", &philox_normal, py::arg("key"), py::arg("rows"), py::arg("draws"), py::arg("action_dim"),
             "Standard normals [draws, rows, action_dim].");
  module.def("reverse_diffusion", &reverse_diffusion, py::arg("weights").noconvert(), py::arg("biases").noconvert(),
             py::arg("time_embedding").noconvert(), py::arg("table").noconvert(), py::arg("start"), py::arg("clip"),
             py::arg("state").noconvert(), py::arg("prompt").noconvert(), py::arg("samples"),
             py::arg("keys").noconvert(), py::arg("noise").noconvert(), py::arg("actions").noconvert(),
             py::arg("threads"));
}
