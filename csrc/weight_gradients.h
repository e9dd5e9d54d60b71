// What follows the backward tiles of a wave: sums over the batch, and the first layer's gradients.
#pragma once

#include "memory.h"
#include "tile/tile_kernels.h"
#include "waves.h"

namespace llmdpd {

// Where the gradients go, in torch's layout and contiguous. `weights`: whether those but x's are asked for; else null.
struct GradientTargets {
  bool weights;
  float *w2, *b2, *w3, *b3, *w4, *b4;
  float* input_weight;  // [H, inputs]
  float* x;             // [states, inputs], or null
  float* init;          // [H], or [states, H]
  bool init_per_state;
  float* action_weight;  // [H, A], chain only
  float* time_rows;      // [steps, H], chain only
};

class WeightGradients {
 public:
  WeightGradients(const Trunk3& trunk, const FirstLayer& first, const RowShape& shape, const GradientTargets& targets,
                  const TileKernels& kernels, Allocator& memory);

  // Adds a wave that begins at row first_row and has `rows` rows.
  void add(const Tape& tape, const TapeGradients& gradients, std::ptrdiff_t first_row, std::ptrdiff_t rows, int threads);
  // Writes what was summed elsewhere to the targets.
  void finish() const;

 private:
  struct Sum {
    float* data;
    std::ptrdiff_t stride;
  };
  Sum sum_for(float* target, int rows, int columns, Allocator& memory);
  void sum_over_samples(const TapeGradients& gradients, std::ptrdiff_t rows) const;
  void add_trunk(const Tape& tape, const TapeGradients& gradients, int threads);
  void write_x(const TapeGradients& gradients, std::ptrdiff_t first_row, std::ptrdiff_t rows, int threads) const;
  void add_first_layer(const TapeGradients& gradients, std::ptrdiff_t first_row, std::ptrdiff_t rows, int threads);

  const Trunk3& trunk_;
  const FirstLayer& first_;
  RowShape shape_;
  GradientTargets targets_;
  const TileKernels& kernels_;
  Sum w2_{}, b2_{}, w3_{}, b3_{}, w4_{}, b4_{}, time_rows_{}, action_transposed_{}, input_transposed_{}, init_{};
  float ones_;           // a word of ones
  float* context_rows_ = nullptr;  // u's gradient summed over a state's samples: panels [hidden_padded / width][states][width]
  float* x_rows_;        // [max states of a wave, padded inputs]
  float* zeros_;
};

}  // namespace llmdpd
