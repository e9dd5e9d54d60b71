// The module `_cuda`: kernels that triton compiled, launched by the CUDA driver without triton's own launcher. A module
// of its own: it shares nothing with what CPUs compute by.

#include <pybind11/pybind11.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/driver.h"

namespace py = pybind11;

namespace {

using llmdpd::cuda::Argument;
using llmdpd::cuda::Driver;
using llmdpd::cuda::Kernel;

// A kernel with the kinds of its arguments, a letter each: p pointer, i int32, l int64, f float32.
struct Typed {
  Kernel kernel;
  std::string kinds;
};

Argument argument(char kind, PyObject* value) {
  Argument made{};
  if (kind == 'f') {
    made.f32 = static_cast<float>(PyFloat_AsDouble(value));
  } else if (kind == 'p') {
    made.pointer = PyLong_AsUnsignedLongLong(value);
  } else {
    const long long number = PyLong_AsLongLong(value);
    made.i64 = number;
    if (kind == 'i') {
      made.i32 = static_cast<std::int32_t>(number);
      if (made.i32 != number && !PyErr_Occurred()) throw std::invalid_argument("an int32 argument is out of range");
    }
  }
  if (PyErr_Occurred()) throw py::error_already_set();
  return made;
}

std::shared_ptr<Typed> load(std::shared_ptr<Driver> driver, const py::bytes& image, const std::string& name, int device,
                            unsigned threads, unsigned shared, const std::string& kinds) {
  if (!driver) throw std::invalid_argument("wrong kind: None");
  if (kinds.find_first_not_of("pilf") != std::string::npos) throw std::invalid_argument("wrong kind of argument");
  const std::string held = image;  // ends in a zero byte, as the driver wants of an image
  py::gil_scoped_release release;
  return std::make_shared<Typed>(Typed{Kernel(std::move(driver), held, name, device, threads, shared), kinds});
}

void launch(const std::shared_ptr<Typed>& self, unsigned programs, unsigned members, std::uintptr_t stream,
            const py::tuple& values) {
  if (!self) throw std::invalid_argument("wrong kind: None");
  const std::string& kinds = self->kinds;
  if (values.size() != kinds.size()) throw std::invalid_argument("wrong number of arguments");
  std::vector<Argument> arguments(kinds.size());
  for (std::size_t i = 0; i < kinds.size(); ++i) {
    arguments[i] = argument(kinds[i], PyTuple_GET_ITEM(values.ptr(), static_cast<py::ssize_t>(i)));
  }
  py::gil_scoped_release release;  // the driver waits where a thousand launches are queued
  self->kernel.launch(programs, members, stream, arguments);
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "Triton's kernels loaded and launched by the CUDA driver; call it through llmdpd.kernels.driver.";
  module.attr("__version__") = LLMDPD_VERSION;
  py::class_<Driver, std::shared_ptr<Driver>>(module, "Driver", "The CUDA driver's library.")
      .def(py::init<const std::string&>(), py::arg("library"));
  py::class_<Typed, std::shared_ptr<Typed>>(module, "Kernel", "A kernel, loaded on one device.")
      .def(py::init(&load), py::arg("driver"), py::arg("image"), py::arg("name"), py::arg("device"), py::arg("threads"),
           py::arg("shared"), py::arg("kinds"), "kinds of the arguments, a letter each: p, i, l or f.")
      .def("launch", &launch, py::arg("programs"), py::arg("members"), py::arg("stream"), py::arg("arguments"),
           "Launch programs x members blocks.");
}
