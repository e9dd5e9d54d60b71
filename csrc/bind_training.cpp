#include <pybind11/stl.h>

#include <array>

#include "bindings.h"
#include "dispatch.h"
#include "mish_mlp.h"
#include "bind_prepared.h"
#include "reverse_diffusion.h"

namespace {

using llmdpd::ChainCall;
using llmdpd::GradientTargets;
using llmdpd::MlpCall;
using FloatsList = std::vector<Floats>;

// [columns] shared by all rows, or [rows, columns].
bool per_row(const Floats& array, py::ssize_t rows, py::ssize_t columns, const char* name) {
  if (array.ndim() == 2) {
    require_shape(array, {rows, columns}, name);
    return true;
  }
  require_shape(array, {columns}, name);
  return false;
}

// In the order of `llmdpd.ops.arguments.ChainArguments`.
struct ChainArguments {
  Strided state, W_s;
  Floats u_z, tau;
  Strided W_a;
  std::vector<Floats> trunk;
  Floats table;
  Keys keys;
  std::optional<Floats> noise;
  float start, clip;
  int samples;
  bool bf16;
  int threads;

  ChainCall call() const {
    ChainCall call{};
    call.trunk = trunk_of(trunk);
    call.W_s = matrix_of(W_s, "state weight");
    call.W_a = matrix_of(W_a, "action weight");
    const llmdpd::Matrix states = matrix_of(state, "state");
    const int hidden = call.trunk.hidden;
    if (call.W_s.outputs != hidden || call.W_a.outputs != hidden || call.W_a.inputs != call.trunk.outputs ||
        states.inputs != call.W_s.inputs) {
      throw std::invalid_argument("wrong shape: state, its weight or the actions' weight");
    }
    if (samples < 1 || threads < 1) throw std::invalid_argument("samples and threads start at 1");
    call.states = states.outputs;
    call.samples = samples;
    call.state = states.data;
    call.state_stride = states.stride;
    call.u_z = u_z.data();
    call.u_z_per_state = per_row(u_z, call.states, hidden, "u_z");
    const py::ssize_t steps = tau.ndim() == 2 ? tau.shape(0) : 0;
    require_shape(tau, {steps, hidden}, "tau");
    require_shape(table, {steps, 6}, "table");
    if (steps < 1) throw std::invalid_argument("wrong shape: a chain needs a step");
    call.tau = tau.data();
    const auto* rows_of_table = reinterpret_cast<const llmdpd::StepCoefficients*>(table.data());
    call.schedule = {small(steps, "table"), rows_of_table, start, clip};
    const py::ssize_t rows = call.states * samples;
    if (noise) require_shape(*noise, {steps + 1, rows, call.trunk.outputs}, "noise");
    const bool key_per_state = keys.ndim() != 1 || keys.shape(0) != 1 || call.states == 1;
    require_shape(keys, {key_per_state ? call.states : 1}, "keys");
    call.noise = {noise ? noise->data() : nullptr, keys.data(), key_per_state};
    return call;
  }
};

// What the size of a tape is computed from: rows of a row block, floats a row, floats more a row block. A function of
// these and of the number of rows, so that it can be computed where the batch is but a symbol.
std::array<py::ssize_t, 3> tape_sizes(int hidden, int outputs, int action_dim, int samples, int steps, bool bf16) {
  if (hidden < 1 || outputs < 1 || action_dim < 0 || samples < 1 || steps < 1) {
    throw std::invalid_argument("sizes of a tape start at 1");
  }
  const llmdpd::RowBlocks::Sizes sizes = llmdpd::RowBlocks::sizes(hidden, outputs, {0, samples, steps, action_dim},
                                                         llmdpd::active_kernels(bf16));
  return {sizes.block_rows, static_cast<py::ssize_t>(sizes.row_floats), static_cast<py::ssize_t>(sizes.block_floats)};
}

// Memory to keep a tape in, large enough for this instruction set and precision; empty: none.
void require_tape(const Floats& tape, std::size_t floats) {
  if (tape.ndim() != 1 || static_cast<std::size_t>(tape.size()) < floats)
    throw std::invalid_argument("wrong shape: tape");
  require_shape(tape, {tape.size()}, "tape");  // aligned, that is
}
float* tape_of(Floats& tape, std::size_t floats) {
  if (tape.size() == 0) return nullptr;
  require_tape(tape, floats);
  return tape.mutable_data();
}
const float* tape_of(const Floats& tape, std::size_t floats) {
  if (tape.size() == 0) return nullptr;
  require_tape(tape, floats);
  return tape.data();
}

void chain_forward(const std::shared_ptr<ChainArguments>& holder, Floats& actions, Floats& tape) {
  const ChainArguments& arguments = held(holder);
  const ChainCall call = arguments.call();
  require_shape(actions, {call.states * call.samples, call.trunk.outputs}, "actions");
  const llmdpd::TileKernels& kernels = llmdpd::active_kernels(arguments.bf16);
  float* kept = tape_of(tape, llmdpd::chain_tape_floats(call, kernels));
  float* out = actions.mutable_data();
  py::gil_scoped_release unlocked;
  llmdpd::chain_forward(call, kernels, arguments.threads, out, kept);
}

// Gradients of the trunk (w2, b2, w3, b3, w4, b4), to be written.
void trunk_targets(std::vector<Floats>& arrays, int hidden, int outputs, GradientTargets& targets) {
  if (arrays.size() != 6) throw std::invalid_argument("wrong number of trunk gradients");
  targets.weights = true;
  const py::ssize_t h = hidden, o = outputs;
  require_shape(arrays[0], {h, h}, "w2's gradient");
  require_shape(arrays[1], {h}, "b2's gradient");
  require_shape(arrays[2], {h, h}, "w3's gradient");
  require_shape(arrays[3], {h}, "b3's gradient");
  require_shape(arrays[4], {o, h}, "w4's gradient");
  require_shape(arrays[5], {o}, "b4's gradient");
  float** fields[] = {&targets.w2, &targets.b2, &targets.w3, &targets.b3, &targets.w4, &targets.b4};
  for (int i = 0; i < 6; ++i) *fields[i] = arrays[i].mutable_data();
}

void chain_backward(const std::shared_ptr<ChainArguments>& holder, const Floats& grad_actions, const Floats& tape,
                    std::optional<Floats> state, Floats& W_s, Floats& u_z, Floats& tau, Floats& W_a,
                    std::vector<Floats> trunk) {
  const ChainArguments& arguments = held(holder);
  const ChainCall call = arguments.call();
  const int hidden = call.trunk.hidden, action_dim = call.trunk.outputs;
  require_shape(grad_actions, {call.states * call.samples, action_dim}, "actions' gradient");
  GradientTargets targets{};
  trunk_targets(trunk, hidden, action_dim, targets);
  require_shape(W_s, {hidden, call.W_s.inputs}, "state weight's gradient");
  if (state) require_shape(*state, {call.states, call.W_s.inputs}, "state's gradient");
  targets.init_per_state = per_row(u_z, call.states, hidden, "u_z's gradient");
  if (targets.init_per_state != call.u_z_per_state) throw std::invalid_argument("wrong shape: u_z's gradient");
  require_shape(W_a, {hidden, action_dim}, "action weight's gradient");
  require_shape(tau, {call.schedule.steps, hidden}, "tau's gradient");
  targets.input_weight = W_s.mutable_data();
  targets.x = state ? state->mutable_data() : nullptr;
  targets.init = u_z.mutable_data();
  targets.W_a = W_a.mutable_data();
  targets.tau = tau.mutable_data();
  const llmdpd::TileKernels& kernels = llmdpd::active_kernels(arguments.bf16);
  const float* kept = tape_of(tape, llmdpd::chain_tape_floats(call, kernels));
  const float* grad = grad_actions.data();
  py::gil_scoped_release unlocked;
  llmdpd::chain_backward(call, kernels, arguments.threads, grad, kept, targets);
}

struct MlpArguments {
  Strided x, input_weight;
  Floats init;
  std::vector<Floats> trunk;
  bool bf16;
  int threads;

  MlpCall call() const {
    MlpCall call{};
    call.trunk = trunk_of(trunk);
    call.input_weight = matrix_of(input_weight, "input weight");
    const llmdpd::Matrix rows = matrix_of(x, "x");
    if (call.input_weight.outputs != call.trunk.hidden || rows.inputs != call.input_weight.inputs) {
      throw std::invalid_argument("wrong shape: x or its weight");
    }
    if (threads < 1) throw std::invalid_argument("threads start at 1");
    call.rows = rows.outputs;
    call.x = rows.data;
    call.x_stride = rows.stride;
    call.init = init.data();
    call.init_per_row = per_row(init, call.rows, call.trunk.hidden, "init");
    return call;
  }
};

using Mlps = std::vector<std::shared_ptr<MlpArguments>>;

// Nets of the same sizes on as many rows.
struct MlpCalls {
  std::vector<MlpCall> calls;
  const llmdpd::TileKernels& kernels;
  int threads;

  explicit MlpCalls(const Mlps& holders)
      : kernels(llmdpd::active_kernels(first(holders).bf16)), threads(first(holders).threads) {
    for (const auto& holder : holders) {
      calls.push_back(held(holder).call());
      const MlpCall &one = calls.front(), &other = calls.back();
      if (held(holder).bf16 != first(holders).bf16 || other.rows != one.rows ||
          other.trunk.hidden != one.trunk.hidden || other.trunk.outputs != one.trunk.outputs ||
          other.input_weight.inputs != one.input_weight.inputs) {
        throw std::invalid_argument("wrong shape: nets of different sizes");
      }
    }
  }
  static const MlpArguments& first(const Mlps& holders) {
    if (holders.empty()) throw std::invalid_argument("wrong number: nets");
    return held(holders[0]);
  }
  std::size_t tape_floats() const { return llmdpd::mlp_tape_floats(calls[0], kernels); }
};

// tapes: one for each net, each empty or none of them.
Call mlps_forward_call(const Mlps& holders, FloatsList outs, FloatsList tapes) {
  MlpCalls nets(holders);
  const std::size_t count = nets.calls.size();
  if (outs.size() != count || tapes.size() != count) throw std::invalid_argument("wrong number: outs or tapes");
  std::vector<float*> to, kept;
  for (std::size_t i = 0; i < count; ++i) {
    require_shape(outs[i], {nets.calls[i].rows, nets.calls[i].trunk.outputs}, "out");
    to.push_back(outs[i].mutable_data());
    kept.push_back(tape_of(tapes[i], nets.tape_floats()));
    if (!kept[i] != !kept[0]) throw std::invalid_argument("wrong shape: tape");
  }
  return [calls = nets.calls, &kernels = nets.kernels, to, kept](int threads) {
    llmdpd::mlps_forward(calls, kernels, threads, to.data(), kept.data());
  };
}

// x, where it is wanted: of each net its gradient. weights: of each those of its input weight, init and trunk, or
// none of them.
Call mlps_backward_call(const Mlps& holders, const FloatsList& grads, const FloatsList& tapes, std::vector<Floats> x,
                        std::vector<FloatsList> weights) {
  MlpCalls nets(holders);
  const std::size_t count = nets.calls.size();
  if (grads.size() != count || tapes.size() != count || weights.size() != count || (!x.empty() && x.size() != count)) {
    throw std::invalid_argument("wrong number: gradients");
  }
  std::vector<GradientTargets> targets(count);
  std::vector<const float*> from, kept;
  for (std::size_t i = 0; i < count; ++i) {
    const MlpCall& call = nets.calls[i];
    const int hidden = call.trunk.hidden;
    require_shape(grads[i], {call.rows, call.trunk.outputs}, "outputs' gradient");
    from.push_back(grads[i].data());
    kept.push_back(tape_of(tapes[i], nets.tape_floats()));
    if (!kept[i] != !kept[0]) throw std::invalid_argument("wrong shape: tape");
    if (!x.empty()) {
      require_shape(x[i], {call.rows, call.input_weight.inputs}, "x's gradient");
      targets[i].x = x[i].mutable_data();
    }
    targets[i].init_per_state = call.init_per_row;
    if (weights[i].empty()) continue;  // no weight's gradient is wanted
    if (weights[i].size() != 8) throw std::invalid_argument("wrong number: weights' gradients");
    std::vector<Floats> trunk(weights[i].begin() + 2, weights[i].end());
    trunk_targets(trunk, hidden, call.trunk.outputs, targets[i]);
    Floats &input_weight = weights[i][0], &init = weights[i][1];
    require_shape(input_weight, {hidden, call.input_weight.inputs}, "input weight's gradient");
    if (per_row(init, call.rows, hidden, "init's gradient") != call.init_per_row) {
      throw std::invalid_argument("wrong shape: init's gradient");
    }
    targets[i].input_weight = input_weight.mutable_data();
    targets[i].init = init.mutable_data();
  }
  return [calls = nets.calls, &kernels = nets.kernels, from, kept, targets](int threads) {
    llmdpd::mlps_backward(calls, kernels, threads, from.data(), kept.data(), targets.data());
  };
}

// What `make` checks and prepares, done at once.
template <auto make, class... Arguments>
void at_once(const Mlps& holders, Arguments... arguments) {
  const Call call = make(holders, arguments...);
  py::gil_scoped_release unlocked;
  call(holders[0]->threads);
}

}  // namespace

void bind_training(py::module_& module) {
  py::class_<ChainArguments, std::shared_ptr<ChainArguments>>(module, "ChainArguments",
                                                              "A call of the chain; see reverse_diffusion.h.")
      .def(py::init([](Strided state, Strided W_s, Floats u_z, Floats tau, Strided W_a, std::vector<Floats> trunk,
                       Floats table, Keys keys, std::optional<Floats> noise, float start, float clip, int samples,
                       bool bf16, int threads) {
             return ChainArguments{state, W_s,   u_z,   tau,  W_a,     std::move(trunk), table, keys,
                                   noise, start, clip, samples, bf16, threads};
           }),
           py::arg("state").noconvert(), py::arg("W_s").noconvert(), py::arg("u_z").noconvert(),
           py::arg("tau").noconvert(), py::arg("W_a").noconvert(), py::arg("trunk").noconvert(),
           py::arg("table").noconvert(), py::arg("keys").noconvert(), py::arg("noise").noconvert(), py::arg("start"),
           py::arg("clip"), py::arg("samples"), py::arg("bf16"), py::arg("threads"));
  py::class_<MlpArguments, std::shared_ptr<MlpArguments>>(module, "MlpArguments",
                                                          "A call of the three-layer net; see mish_mlp.h.")
      .def(py::init([](Strided x, Strided input_weight, Floats init, std::vector<Floats> trunk, bool bf16,
                       int threads) { return MlpArguments{x, input_weight, init, std::move(trunk), bf16, threads}; }),
           py::arg("x").noconvert(), py::arg("input_weight").noconvert(), py::arg("init").noconvert(),
           py::arg("trunk").noconvert(), py::arg("bf16"), py::arg("threads"));
  module.def("pooled_buffer", &pooled_buffer, py::arg("floats"), "float32 [floats], not initialised.");
  module.def("tape_sizes", &tape_sizes, py::arg("hidden"), py::arg("outputs"), py::arg("action_dim"),
             py::arg("samples"), py::arg("steps"), py::arg("bf16"));
  module.def("chain_forward", &chain_forward, py::arg("arguments"), py::arg("actions").noconvert(),
             py::arg("tape").noconvert());
  module.def("chain_backward", &chain_backward, py::arg("arguments"), py::arg("grad_actions").noconvert(),
             py::arg("tape").noconvert(), py::arg("state").noconvert(), py::arg("W_s").noconvert(),
             py::arg("u_z").noconvert(), py::arg("tau").noconvert(), py::arg("W_a").noconvert(),
             py::arg("trunk").noconvert());
  module.def("mlps_forward", &at_once<&mlps_forward_call, FloatsList, FloatsList>, py::arg("nets"), py::arg("outs").noconvert(),
             py::arg("tapes").noconvert());
  module.def("mlps_backward",
             &at_once<&mlps_backward_call, FloatsList, FloatsList, std::vector<Floats>, std::vector<FloatsList>>,
             py::arg("nets"), py::arg("grads").noconvert(), py::arg("tapes").noconvert(), py::arg("x").noconvert(),
             py::arg("weights").noconvert());
  define_later(module, "add_mlps_forward", &mlps_forward_call, py::arg("nets"), py::arg("outs").noconvert(),
               py::arg("tapes").noconvert());
  define_later(module, "add_mlps_backward", &mlps_backward_call, py::arg("nets"), py::arg("grads").noconvert(),
               py::arg("tapes").noconvert(), py::arg("x").noconvert(), py::arg("weights").noconvert());
}
