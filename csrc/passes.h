// Forward and backward passes of a batch over tiles and row blocks: the same for the chain and for the three-layer net.
#pragma once

#include <memory>
#include <vector>

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

// Calls body(which, first row, rows, scratch) for the tiles of `rows` rows from `first` on, of each of `count` problems of
// the same sizes.
template <class Problem, class Body>
void for_tiles(const Pass<Problem>* passes, int count, std::ptrdiff_t first, std::ptrdiff_t rows, const Body& body) {
  const Pass<Problem>& any = passes[0];
  const std::size_t scratch_floats = any.kernels.scratch_floats(any.problem.trunk, any.shape.action_dim);
  const RowSplit parts(rows, any.kernels.max_rows, any.threads);
  const int each = parts.count();
  parallel_for(count * each, any.threads, [&](int i) {
    thread_local Arena scratch;
    const Part part = parts[i % each];
    body(i / each, first + part.first, part.rows, scratch.reserve(scratch_floats));
  });
}

template <class Problem>
void forward_block(const Pass<Problem>* passes, const RowBlocks& blocks, std::ptrdiff_t block,
                   const std::vector<Tape>& kept) {
  const std::ptrdiff_t first = blocks.first(block);
  for (const Tape& tape : kept) blocks.clear_padding(block, tape);
  for_tiles(passes, static_cast<int>(kept.size()), first, blocks.rows(block),
            [&](int which, std::ptrdiff_t row, int rows, float* scratch) {
              passes[which].forward(passes[which].problem, row, rows, &kept[which], first, scratch);
            });
}

// `tapes`: memory of each problem for what its backward pass reads, or null where none of them keeps anything.
template <class Problem>
void forward_passes(const Pass<Problem>* passes, int count, float* const* tapes) {
  const RowShape& shape = passes[0].shape;
  if (shape.rows == 0) return;
  if (!tapes || !tapes[0]) {
    return for_tiles(passes, count, 0, shape.rows, [&](int which, std::ptrdiff_t row, int rows, float* scratch) {
      passes[which].forward(passes[which].problem, row, rows, nullptr, 0, scratch);
    });
  }
  const RowBlocks blocks(shape, passes[0].problem.trunk, passes[0].kernels);
  std::vector<Tape> kept(count);
  for (std::ptrdiff_t block = 0; block < blocks.count(); ++block) {
    for (int i = 0; i < count; ++i) kept[i] = blocks.tape_in(block, tapes[i]);
    forward_block(passes, blocks, block, kept);
  }
}

// Without tapes the forward pass is computed again, row block by row block; its results go where the problem says.
template <class Problem>
void backward_passes(const Pass<Problem>* passes, int count, const float* const* grads, const float* const* tapes,
                     const GradientTargets* targets) {
  thread_local Arena gradient_arena, block_arena;
  const Pass<Problem>& any = passes[0];
  // Declared out here: `add` works on what the second laying out made.
  std::vector<std::unique_ptr<WeightGradients>> sums(count);
  lay_out(gradient_arena, [&](Allocator& memory) {
    for (int i = 0; i < count; ++i) {
      sums[i] = std::make_unique<WeightGradients>(passes[i].problem.trunk, passes[i].problem.first, passes[i].shape,
                                                  targets[i], passes[i].kernels, memory);
    }
  });
  const RowBlocks blocks(any.shape, any.problem.trunk, any.kernels);
  for (std::ptrdiff_t block = 0; block < blocks.count(); ++block) {
    const std::ptrdiff_t first = blocks.first(block), rows = blocks.rows(block);
    std::vector<Tape> kept(count);
    std::vector<TapeGradients> gradients(count);
    lay_out(block_arena, [&](Allocator& memory) {
      for (int i = 0; i < count; ++i) {
        gradients[i] = blocks.gradients(block, memory);
        if (!tapes[0]) kept[i] = blocks.tape(block, memory);
      }
    });
    for (int i = 0; tapes[0] && i < count; ++i) {
      kept[i] = blocks.tape_in(block, const_cast<float*>(tapes[i]));  // read only
    }
    if (!tapes[0]) forward_block(passes, blocks, block, kept);
    for_tiles(passes, count, first, rows, [&](int which, std::ptrdiff_t row, int tile_rows, float* scratch) {
      passes[which].backward(passes[which].problem, grads[which], row, tile_rows, kept[which], gradients[which], first,
                             scratch);
    });
    Tasks tasks;
    for (int i = 0; i < count; ++i) sums[i]->add(kept[i], gradients[i], first, rows, any.threads, tasks);
    run_tasks(tasks, any.threads);
  }
  for (const auto& sum : sums) sum->finish();
}

template <class Problem>
void forward_pass(const Pass<Problem>& pass, float* tape) {
  forward_passes(&pass, 1, &tape);
}

template <class Problem>
void backward_pass(const Pass<Problem>& pass, const float* grad, const float* tape, const GradientTargets& targets) {
  backward_passes(&pass, 1, &grad, &tape, &targets);
}

}  // namespace llmdpd
