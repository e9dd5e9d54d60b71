// What follows the backward tiles of a row block: sums over the batch, and the first layer's gradients.
#pragma once

#include <functional>
#include <vector>

#include "memory.h"
#include "row_blocks.h"
#include "thread_pool.h"
#include "tile/tile_kernels.h"

namespace llmdpd {

// What the threads of a call share out among them: none waits for another.
using Tasks = std::vector<std::function<void()>>;

inline void run_tasks(const Tasks& tasks, int threads) {
  parallel_for(static_cast<int>(tasks.size()), threads, [&](int i) { tasks[i](); });
}

// Where the gradients go, in torch's layout and contiguous. `weights`: whether those but x's are asked for; else null.
struct GradientTargets {
  bool weights;
  float *w2, *b2, *w3, *b3, *w4, *b4;
  float* input_weight;  // [H, inputs]
  float* x;             // [states, inputs], or null
  float* init;          // [H], or [states, H]
  bool init_per_state;
  float* W_a;  // [H, A], chain only
  float* tau;      // [steps, H], chain only
};

class WeightGradients {
 public:
  WeightGradients(const Trunk3& trunk, const FirstLayer& first, const RowShape& shape, const GradientTargets& targets,
                  const TileKernels& kernels, Allocator& memory);

  // Adds a row block that begins at row first_row and has `rows` rows, when the tasks are run that it appends.
  void add(const Tape& tape, const TapeGradients& gradients, std::ptrdiff_t first_row, std::ptrdiff_t rows, int threads,
           Tasks& tasks);
  // Writes what was summed elsewhere to the targets.
  void finish() const;

 private:
  struct Sum {
    float* data;
    std::ptrdiff_t stride;
  };
  Sum sum_for(float* target, int rows, int columns, Allocator& memory);
  void sum_over_samples(const TapeGradients& gradients, std::ptrdiff_t rows) const;
  void add_trunk(const Tape& tape, const TapeGradients& gradients, Tasks& tasks) const;
  void write_x(const TapeGradients& gradients, std::ptrdiff_t first_row, std::ptrdiff_t rows, int threads,
               Tasks& tasks) const;
  void add_first_layer(const TapeGradients& gradients, std::ptrdiff_t first_row, std::ptrdiff_t rows,
                       Tasks& tasks) const;

  const Trunk3& trunk_;
  const FirstLayer& first_;
  RowShape shape_;
  GradientTargets targets_;
  const TileKernels& kernels_;
  Sum w2_{}, b2_{}, w3_{}, b3_{}, w4_{}, b4_{}, tau_{}, action_transposed_{}, input_transposed_{}, init_{};
  float ones_;          // a lane of ones
  bool begun_ = false;  // whether the sums hold a row block already
  // u's gradient summed over a state's samples: packed tiles [hidden_padded / width][states][width]
  float* u_rows_ = nullptr;
  float* x_rows_;  // [max states of a row block, padded inputs]
  float* zeros_;
};

}  // namespace llmdpd
