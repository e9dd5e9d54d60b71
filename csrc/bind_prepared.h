// Calls that are checked and prepared with Python, once, and run many times without it: those of several learners side
// by side. What they read and write lies where it lay when they were prepared.
#pragma once

#include <pybind11/stl.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"

using Call = std::function<void(int threads)>;

// Of one learner, in the order in which they run.
class PreparedCalls {
 public:
  // `holds`: the arrays that the call reads and writes, which live as long.
  void add(Call call, py::tuple holds) {
    calls_.push_back(std::move(call));
    holds_.append(std::move(holds));
  }
  void run(int threads) const {
    for (const Call& call : calls_) call(threads);
  }

 private:
  std::vector<Call> calls_;
  py::list holds_;
};

// Defines a function that leaves to prepared calls what `make` checks and prepares.
template <class... Arguments, class... Names>
void define_later(py::module_& module, const char* name, Call (*make)(Arguments...), const Names&... names) {
  module.def(
      name,
      [make](const std::shared_ptr<PreparedCalls>& calls, Arguments... arguments) {
        held(calls);
        Call call = make(arguments...);
        calls->add(std::move(call), py::make_tuple(arguments...));
      },
      py::arg("calls"), names...);
}

// Runs each member's calls, whole members on several threads where they share out evenly, else each by all of them.
void run_together(const std::vector<std::shared_ptr<PreparedCalls>>& members, int threads);
