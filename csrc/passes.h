// Forward and backward passes of a batch over tiles and waves: the same for the chain and for the three-layer net.
#pragma once

#include <memory>

#include "thread_pool.h"
#include "waves.h"
#include "weight_gradients.h"

namespace llmdpd {

// A prepared problem (`Chain` or `Mlp`) with the functions for its tiles.
template <class Problem>
struct Pass {
  const Problem& problem;
  RowShape shape;
  void (*forward)(const Problem&, std::ptrdiff_t, int, const Tape*, std::ptrdiff_t, float*);
  void (*backward)(const Problem&, const float*, std::ptrdiff_t, int, const Tape&, const TapeGradients&, std::ptrdiff_t,
                   float*);
  const TileKernels& kernels;
  int threads;
};

// Calls body(first row, rows, scratch) for the tiles of `rows` rows from `first` on.
template <class Problem, class Body>
void for_tiles(const Pass<Problem>& pass, std::ptrdiff_t first, std::ptrdiff_t rows, const Body& body) {
  const std::size_t scratch_floats = pass.kernels.scratch_floats(pass.problem.trunk, pass.shape.action_dim);
  const RowSplit parts(rows, pass.kernels.max_rows, pass.threads);
  parallel_for(parts.count(), pass.threads, [&](int i) {
    thread_local Arena scratch;
    const Part part = parts[i];
    body(first + part.first, part.rows, scratch.reserve(scratch_floats));
  });
}

template <class Problem>
void forward_rows(const Pass<Problem>& pass, std::ptrdiff_t first, std::ptrdiff_t rows, const Tape* tape) {
  for_tiles(pass, first, rows, [&](std::ptrdiff_t row, int count, float* scratch) {
    pass.forward(pass.problem, row, count, tape, first, scratch);
  });
}

template <class Problem>
void forward_wave(const Pass<Problem>& pass, const Waves& waves, std::ptrdiff_t wave, const Tape& tape) {
  waves.clear_padding(wave, tape);
  forward_rows(pass, waves.first(wave), waves.rows(wave), &tape);
}

// `tape`: memory for what the backward pass reads, or null.
template <class Problem>
void forward_pass(const Pass<Problem>& pass, float* tape) {
  if (pass.shape.rows == 0) return;
  if (!tape) return forward_rows(pass, 0, pass.shape.rows, nullptr);
  const Waves waves(pass.shape, pass.problem.trunk, pass.kernels);
  for (std::ptrdiff_t wave = 0; wave < waves.count(); ++wave) {
    forward_wave(pass, waves, wave, waves.tape_in(wave, tape));
  }
}

// Without a tape the forward pass is computed again, wave by wave; its results go where the problem says.
template <class Problem>
void backward_pass(const Pass<Problem>& pass, const float* grad, const float* tape, const GradientTargets& targets) {
  thread_local Arena gradient_arena, wave_arena;
  // Declared out here: `add` works on what the second laying out made.
  std::unique_ptr<WeightGradients> sums;
  lay_out(gradient_arena, [&](Allocator& memory) {
    sums = std::make_unique<WeightGradients>(pass.problem.trunk, pass.problem.first, pass.shape, targets, pass.kernels,
                                             memory);
  });
  const Waves waves(pass.shape, pass.problem.trunk, pass.kernels);
  for (std::ptrdiff_t wave = 0; wave < waves.count(); ++wave) {
    const std::ptrdiff_t first = waves.first(wave), rows = waves.rows(wave);
    Tape kept{};
    TapeGradients gradients{};
    lay_out(wave_arena, [&](Allocator& memory) {
      gradients = waves.gradients(wave, memory);
      if (!tape) kept = waves.tape(wave, memory);
    });
    if (tape) {
      kept = waves.tape_in(wave, const_cast<float*>(tape));  // read only
    } else {
      forward_wave(pass, waves, wave, kept);
    }
    for_tiles(pass, first, rows, [&](std::ptrdiff_t row, int count, float* scratch) {
      pass.backward(pass.problem, grad, row, count, kept, gradients, first, scratch);
    });
    sums->add(kept, gradients, first, rows, pass.threads);
  }
  sums->finish();
}

}  // namespace llmdpd
