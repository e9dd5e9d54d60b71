#include "bindings.h"

#include <pybind11/stl.h>

#include <limits>

#include "buffer_pool.h"
#include "dispatch.h"

namespace {

// numpy makes arrays at any byte of a buffer; reading a number there is undefined, whatever the CPU says.
void require_aligned(const py::array& array, const char* name) {
  if (array.size() > 0 && reinterpret_cast<std::uintptr_t>(array.data()) % array.itemsize() != 0) {
    throw std::invalid_argument(std::string("not aligned: ") + name);
  }
}

}  // namespace

void require_shape(const py::array& array, const std::vector<py::ssize_t>& shape, const char* name) {
  bool same = array.ndim() == static_cast<py::ssize_t>(shape.size());
  for (std::size_t i = 0; same && i < shape.size(); ++i) same = array.shape(static_cast<py::ssize_t>(i)) == shape[i];
  if (!same) throw std::invalid_argument(std::string("wrong shape: ") + name);
  require_aligned(array, name);
}

int small(py::ssize_t size, const char* name) {
  if (size < 0 || size > std::numeric_limits<int>::max())
    throw std::invalid_argument(std::string("too large: ") + name);
  return static_cast<int>(size);
}

llmdpd::Matrix matrix_of(const Strided& array, const char* name) {
  constexpr py::ssize_t size = sizeof(float);
  if (array.ndim() != 2) throw std::invalid_argument(std::string("wrong shape: ") + name);
  const py::ssize_t rows = array.shape(0), columns = array.shape(1);
  // What a row of one number, or a single row, has for a stride says nothing.
  if (array.size() > 0 && ((columns > 1 && array.strides(1) != size) || (rows > 1 && array.strides(0) % size != 0))) {
    throw std::invalid_argument(std::string("rows are not contiguous: ") + name);
  }
  require_aligned(array, name);
  return {array.data(), rows > 1 ? array.strides(0) / size : columns, small(rows, name), small(columns, name)};
}

Floats pooled_buffer(py::ssize_t floats) {
  if (floats < 0) throw std::invalid_argument("wrong shape: buffer");
  float* memory = llmdpd::acquire_buffer(static_cast<std::size_t>(floats));
  const py::capsule owner(memory, [](void* buffer) { llmdpd::release_buffer(static_cast<float*>(buffer)); });
  return Floats({floats}, memory, owner);
}

llmdpd::TrunkWeights trunk_of(const std::vector<Floats>& arrays) {
  if (arrays.size() != 6 || arrays[4].ndim() != 2) throw std::invalid_argument("wrong shape: trunk");
  const py::ssize_t outputs = arrays[4].shape(0), hidden = arrays[4].shape(1);
  if (hidden < 1 || outputs < 1) throw std::invalid_argument("wrong shape: hidden and action dimensions start at 1");
  require_shape(arrays[0], {hidden, hidden}, "second weight");
  require_shape(arrays[1], {hidden}, "second bias");
  require_shape(arrays[2], {hidden, hidden}, "third weight");
  require_shape(arrays[3], {hidden}, "third bias");
  require_shape(arrays[4], {outputs, hidden}, "output weight");
  require_shape(arrays[5], {outputs}, "output bias");
  return {small(hidden, "hidden"), small(outputs, "outputs"), arrays[0].data(), arrays[1].data(),
          arrays[2].data(),        arrays[3].data(),          arrays[4].data(), arrays[5].data()};
}

namespace {

Floats philox_normal(std::uint64_t key, py::ssize_t rows, int draws, int action_dim) {
  if (rows < 0 || draws < 0 || action_dim < 1) throw std::invalid_argument("wrong shape: rows, draws or action_dim");
  Floats out({static_cast<py::ssize_t>(draws), rows, static_cast<py::ssize_t>(action_dim)});
  const llmdpd::NoiseKeys keys{&key, false, 1, action_dim};
  if (out.size() > 0) llmdpd::active_kernels(false).normals(keys, 0, small(rows, "rows"), 0, draws, out.mutable_data());
  return out;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "What llmdpd computes in C++; call it through llmdpd.diffusion, .policy and .ops.";
  module.attr("__version__") = LLMDPD_VERSION;
  module.attr("compiler") = LLMDPD_COMPILER;
  module.attr("flags") = LLMDPD_FLAGS;
  module.def("compiled_isas", &llmdpd::compiled_isas, "Instruction sets compiled in, slowest first.");
  module.def("runnable_isas", &llmdpd::runnable_isas, "Those of them that this CPU has.");
  module.def("active_isa", &llmdpd::active_isa);
  module.def("set_isa", &llmdpd::set_isa, py::arg("name"), "Use this instruction set; the best one for ''.");
  module.def("philox_normal", &philox_normal, py::arg("key"), py::arg("rows"), py::arg("draws"), py::arg("action_dim"),
             "Standard normals [draws, rows, action_dim].");
  bind_sampler(module);
  bind_together(module);
  bind_context(module);
  bind_layers(module);
  bind_nodes(module);
  bind_optimizer(module);
  bind_training(module);
}
