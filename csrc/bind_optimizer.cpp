#include <pybind11/stl.h>

#include <cmath>

#include "bindings.h"
#include "dispatch.h"
#include "optimizer.h"

namespace {

using llmdpd::Numbers;
using FloatsList = std::vector<Floats>;

void require_same(const Floats& array, const Floats& like, const char* name) {
  require_shape(array, std::vector<py::ssize_t>(like.shape(), like.shape() + like.ndim()), name);
}

void require_same(const FloatsList& lists, const FloatsList& like, const char* name) {
  if (lists.size() != like.size()) throw std::invalid_argument(std::string("wrong number: ") + name);
  for (std::size_t i = 0; i < lists.size(); ++i) require_same(lists[i], like[i], name);
}

double sum_of_squares(const FloatsList& gradients, int threads) {
  if (threads < 1) throw std::invalid_argument("threads start at 1");
  std::vector<Numbers> tensors;
  for (const Floats& gradient : gradients) {
    require_same(gradient, gradient, "gradient");
    tensors.push_back({gradient.size(), gradient.data(), nullptr, nullptr, nullptr});
  }
  py::gil_scoped_release unlocked;
  return llmdpd::sum_of_squares(tensors, llmdpd::active_layers(), threads);
}

void adamw(FloatsList& weights, const FloatsList& gradients, FloatsList& means, FloatsList& squares, double rate,
           double beta1, double beta2, double epsilon, double decay, double step, double scale, int threads) {
  require_same(gradients, weights, "gradients");
  require_same(means, weights, "means");
  require_same(squares, weights, "squares");
  if (threads < 1 || !(step >= 1)) throw std::invalid_argument("threads and steps start at 1");
  std::vector<Numbers> tensors;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    require_same(weights[i], weights[i], "weight");
    tensors.push_back({weights[i].size(), gradients[i].data(), means[i].mutable_data(), squares[i].mutable_data(),
                       weights[i].mutable_data()});
  }
  const llmdpd::AdamW of{static_cast<float>(rate),    static_cast<float>(beta1),
                         static_cast<float>(beta2),   static_cast<float>(epsilon),
                         static_cast<float>(decay),   static_cast<float>(1.0 - std::pow(beta1, step)),
                         static_cast<float>(1.0 - std::pow(beta2, step)), static_cast<float>(scale)};
  py::gil_scoped_release unlocked;
  llmdpd::adamw(of, tensors, llmdpd::active_layers(), threads);
}

void average(FloatsList& targets, const FloatsList& sources, float rate, int threads) {
  require_same(sources, targets, "sources");
  if (threads < 1) throw std::invalid_argument("threads start at 1");
  std::vector<Numbers> tensors;
  for (std::size_t i = 0; i < targets.size(); ++i) {
    require_same(targets[i], targets[i], "target");
    tensors.push_back({targets[i].size(), sources[i].data(), nullptr, nullptr, targets[i].mutable_data()});
  }
  py::gil_scoped_release unlocked;
  llmdpd::average(rate, tensors, llmdpd::active_layers(), threads);
}

double add_up(FloatsList& tensors, const FloatsList& rows, int threads) {
  if (threads < 1) throw std::invalid_argument("threads start at 1");
  std::vector<Numbers> numbers;
  py::ssize_t whole = 0;
  for (Floats& tensor : tensors) {
    require_same(tensor, tensor, "tensor");
    whole += tensor.size();
    numbers.push_back({tensor.size(), nullptr, nullptr, nullptr, tensor.mutable_data()});
  }
  std::vector<const float*> from;
  for (const Floats& row : rows) {
    require_shape(row, {whole}, "row");
    from.push_back(row.data());
  }
  py::gil_scoped_release unlocked;
  return llmdpd::add_up(numbers, from, llmdpd::active_layers(), threads);
}

}  // namespace

void bind_optimizer(py::module_& module) {
  module.def("sum_of_squares", &sum_of_squares, py::arg("gradients").noconvert(), py::arg("threads"));
  module.def("adamw", &adamw, py::arg("weights").noconvert(), py::arg("gradients").noconvert(),
             py::arg("means").noconvert(), py::arg("squares").noconvert(), py::arg("rate"), py::arg("beta1"),
             py::arg("beta2"), py::arg("epsilon"), py::arg("decay"), py::arg("step"), py::arg("scale"),
             py::arg("threads"));
  module.def("add_up", &add_up, py::arg("tensors").noconvert(), py::arg("rows").noconvert(), py::arg("threads"));
  module.def("average", &average, py::arg("targets").noconvert(), py::arg("sources").noconvert(), py::arg("rate"),
             py::arg("threads"));
}
