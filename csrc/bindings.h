// The parts of the Python module, one file each, and what they share.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "packing.h"

namespace py = pybind11;

// float32, of any strides; or contiguous.
using Strided = py::array_t<float, 0>;
using Floats = py::array_t<float, py::array::c_style>;
using Integers = py::array_t<std::int32_t, py::array::c_style>;
using Indices = py::array_t<std::int64_t, py::array::c_style>;
using Keys = py::array_t<std::uint64_t, py::array::c_style>;

// llmdpd/diffusion/sampler.py gives users the readable errors; these keep a wrong call from reading elsewhere.
void require_shape(const py::array& array, const std::vector<py::ssize_t>& shape, const char* name);
// A matrix whose rows are contiguous, at any distance from each other.
llmdpd::Matrix matrix_of(const Strided& array, const char* name);
// w2, b2, w3, b3, w4, b4, each contiguous.
llmdpd::TrunkWeights trunk_of(const std::vector<Floats>& arrays);
// A size that the code counts in 32 bits.
int small(py::ssize_t size, const char* name);
// float32 [floats], not initialised, in memory of the pool, which gets it back when nothing refers to the array any more.
Floats pooled_buffer(py::ssize_t floats);

// What a Python object holds. Taking the holder refuses objects that were allocated and never initialised, None here.
template <class Held>
const Held& held(const std::shared_ptr<Held>& holder) {
  if (!holder) throw std::invalid_argument("wrong kind: None");
  return *holder;
}

void bind_context(py::module_& module);
void bind_layers(py::module_& module);
void bind_nodes(py::module_& module);
void bind_optimizer(py::module_& module);
void bind_sampler(py::module_& module);
void bind_together(py::module_& module);
void bind_training(py::module_& module);
