// Layers with gradients, features and the optimiser as calls for the test of concurrency (concurrency_test.cpp).
#include <algorithm>
#include <list>
#include <memory>
#include <numeric>

#include "../context.h"
#include "../layers.h"
#include "../optimizer.h"
#include "inputs.h"

namespace inputs {
namespace {

// Numbers that a call reads, made once; and numbers that it writes, made anew.
class Store {
 public:
  float* normals(Random& random, std::size_t count) {
    return parts_.emplace_back(inputs::normals(random, count, 0.3f)).data();
  }
  float* room(std::size_t count) { return parts_.emplace_back(count, -7.0f).data(); }
  llmdpd::Linear linear(Random& random, int outputs, int inputs) {
    return {{normals(random, std::size_t(outputs) * inputs), inputs, outputs, inputs}, normals(random, outputs)};
  }
  llmdpd::LinearTarget target(const llmdpd::Linear& of) {
    return {room(std::size_t(of.weight.outputs) * of.weight.inputs), room(of.weight.outputs)};
  }
  Floats all() const {
    Floats joined;
    for (const Floats& part : parts_) joined.insert(joined.end(), part.begin(), part.end());
    return joined;
  }

 private:
  std::list<Floats> parts_;
};

llmdpd::LayerTools tools(int threads) {
  return {llmdpd::active_kernels(false), llmdpd::active_layers(), threads};
}

}  // namespace

Call make_linear(Random& random) {
  const auto store = std::make_shared<Store>();
  const int rows = between(random, 1, 200), inputs = between(random, 1, 70), count = between(random, 0, 2);
  llmdpd::LinearInputs in{rows, inputs, store->normals(random, std::size_t(rows) * inputs), {}, {}};
  in.norm = {store->normals(random, inputs), store->normals(random, inputs)};
  std::vector<int> widths;
  for (int i = 0; i < count; ++i) {
    widths.push_back(between(random, 1, 90));
    in.layers.push_back(store->linear(random, widths.back(), inputs));
  }
  if (widths.empty()) widths.push_back(inputs);  // the norm alone
  return [store, in, widths](int threads) {
    Store written;
    std::vector<float*> out;
    for (const int width : widths) out.push_back(written.room(std::size_t(in.rows) * width));
    std::vector<llmdpd::LinearTarget> targets;
    for (const llmdpd::Linear& layer : in.layers) targets.push_back(written.target(layer));
    float* d_x = written.room(std::size_t(in.rows) * in.inputs);
    const llmdpd::NormTarget of_norm{written.room(in.inputs), written.room(in.inputs)};
    std::vector<float> tape(llmdpd::linear_tape_floats(in.rows, in.inputs, true, tools(threads)));
    llmdpd::linear_forward(in, out, tape.data(), tools(threads));
    llmdpd::linear_backward(in, {out.begin(), out.end()}, tape.data(), d_x, of_norm, targets, tools(threads));
    return written.all();
  };
}

Call make_attention(Random& random) {
  const auto store = std::make_shared<Store>();
  const int heads = between(random, 1, 4), width = heads * between(random, 1, 20), wide = between(random, 1, 90);
  const int groups = between(random, 1, 5), rows = between(random, 1, 30), steps = between(random, 1, 40);
  const auto make = [&](std::size_t count) { return store->normals(random, count); };
  const std::size_t memory = std::size_t(groups) * steps * width, hidden = std::size_t(groups) * rows * width;
  const llmdpd::AttentionInputs in{groups, rows, steps, width, wide, heads,
                                   make(hidden), make(memory), make(memory), make(std::size_t(groups) * steps),
                                   {make(width), make(width)}, {make(width), make(width)},
                                   store->linear(random, width, width), store->linear(random, width, width),
                                   store->linear(random, wide, width), store->linear(random, width, wide)};
  return [store, in, memory, hidden](int threads) {
    Store written;
    const auto room = [&](std::size_t count) { return written.room(count); };
    const std::size_t w = in.width;
    float* out = room(hidden);
    const llmdpd::AttentionTargets targets{room(hidden), room(memory), room(memory), {room(w), room(w)},
                                           {room(w), room(w)}, written.target(in.query), written.target(in.out),
                                           written.target(in.widen), written.target(in.narrow)};
    std::vector<float> tape(llmdpd::attention_tape_floats(in, tools(threads)));
    llmdpd::attention_forward(in, out, tape.data(), tools(threads));
    llmdpd::attention_backward(in, out, tape.data(), targets, tools(threads));
    return written.all();
  };
}

Call make_optimizer(Random& random) {
  const auto store = std::make_shared<Store>();
  std::vector<std::ptrdiff_t> counts;
  for (int i = between(random, 1, 5); i > 0; --i) counts.push_back(between(random, 0, 40000));
  std::vector<const float*> gradients;
  for (const std::ptrdiff_t count : counts) gradients.push_back(store->normals(random, count));
  return [store, counts, gradients](int threads) {
    Store written;
    std::vector<llmdpd::Numbers> tensors;
    for (std::size_t i = 0; i < counts.size(); ++i) {
      Floats zeros(counts[i], 0.0f);
      float* parts[3];
      for (float*& part : parts) std::copy(zeros.begin(), zeros.end(), part = written.room(counts[i]));
      tensors.push_back({counts[i], gradients[i], parts[0], parts[1], parts[2]});
    }
    const llmdpd::LayerKernels& kernels = llmdpd::active_layers();
    llmdpd::adamw({0.1f, 0.9f, 0.99f, 1e-8f, 0.01f, 0.1f, 0.01f, 1.0f}, tensors, kernels, threads);
    llmdpd::average(0.25f, tensors, kernels, threads);
    const Floats row(std::accumulate(counts.begin(), counts.end(), std::ptrdiff_t{0}), 0.5f);
    const double squares = llmdpd::add_up(tensors, {row.data(), row.data()}, kernels, threads);
    Floats all = written.all();
    all.push_back(static_cast<float>(llmdpd::sum_of_squares(tensors, kernels, threads)));
    all.push_back(static_cast<float>(squares));
    return all;
  };
}

}  // namespace inputs
