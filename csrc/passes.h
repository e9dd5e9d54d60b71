// Forward and backward passes of a batch over tiles and row blocks: the same for the chain and for the three-layer net.
#pragma once

#include <memory>

#include "thread_pool.h"
#include "row_blocks.h"
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
void forward_block(const Pass<Problem>& pass, const RowBlocks& blocks, std::ptrdiff_t block, const Tape& tape) {
  blocks.clear_padding(block, tape);
  forward_rows(pass, blocks.first(block), blocks.rows(block), &tape);
}

// `tape`: memory for what the backward pass reads, or null.
template <class Problem>
void forward_pass(const Pass<Problem>& pass, float* tape) {
  if (pass.shape.rows == 0) return;
  if (!tape) return forward_rows(pass, 0, pass.shape.rows, nullptr);
  const RowBlocks blocks(pass.shape, pass.problem.trunk, pass.kernels);
  for (std::ptrdiff_t block = 0; block < blocks.count(); ++block) {
    forward_block(pass, blocks, block, blocks.tape_in(block, tape));
  }
}

// Without a tape the forward pass is computed again, row block by row block; its results go where the problem says.
template <class Problem>
void backward_pass(const Pass<Problem>& pass, const float* grad, const float* tape, const GradientTargets& targets) {
  thread_local Arena gradient_arena, block_arena;
  // Declared out here: `add` works on what the second laying out made.
  std::unique_ptr<WeightGradients> sums;
  lay_out(gradient_arena, [&](Allocator& memory) {
    sums = std::make_unique<WeightGradients>(pass.problem.trunk, pass.problem.first, pass.shape, targets, pass.kernels,
                                             memory);
  });
  const RowBlocks blocks(pass.shape, pass.problem.trunk, pass.kernels);
  for (std::ptrdiff_t block = 0; block < blocks.count(); ++block) {
    const std::ptrdiff_t first = blocks.first(block), rows = blocks.rows(block);
    Tape kept{};
    TapeGradients gradients{};
    lay_out(block_arena, [&](Allocator& memory) {
      gradients = blocks.gradients(block, memory);
      if (!tape) kept = blocks.tape(block, memory);
    });
    if (tape) {
      kept = blocks.tape_in(block, const_cast<float*>(tape));  // read only
    } else {
      forward_block(pass, blocks, block, kept);
    }
    for_tiles(pass, first, rows, [&](std::ptrdiff_t row, int count, float* scratch) {
      pass.backward(pass.problem, grad, row, count, kept, gradients, first, scratch);
    });
    sums->add(kept, gradients, first, rows, pass.threads);
  }
  sums->finish();
}

}  // namespace llmdpd
