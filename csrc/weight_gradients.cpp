#include "weight_gradients.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "thread_pool.h"

namespace llmdpd {
namespace {

float lane_of_ones(int per_lane) {
  if (per_lane == 1) return 1.0f;
  const std::uint32_t bits = 0x3f803f80;  // two times 1 in bfloat16
  float lane;
  std::memcpy(&lane, &bits, sizeof lane);
  return lane;
}

void copy_matrix(const float* from, std::ptrdiff_t stride, int rows, int columns, float* to) {
  for (int r = 0; r < rows; ++r) std::copy_n(from + r * stride, columns, to + static_cast<std::ptrdiff_t>(r) * columns);
}

void copy_transposed(const float* from, std::ptrdiff_t stride, int rows, int columns, float* to) {
  for (int c = 0; c < columns; ++c) {
    for (int r = 0; r < rows; ++r) to[static_cast<std::ptrdiff_t>(c) * rows + r] = from[r * stride + c];
  }
}

}  // namespace

// Sums run over whole vectors: straight into the target where its rows are such.
WeightGradients::Sum WeightGradients::sum_for(float* target, int rows, int columns, Allocator& memory) {
  const int width = padded(columns, kernels_.width);
  Sum sum{target, columns};
  if (!target || width != columns) sum = {memory.take(static_cast<std::size_t>(rows) * width), width};
  if (!memory.counting()) std::fill_n(sum.data, static_cast<std::size_t>(rows) * width, 0.0f);
  return sum;
}

WeightGradients::WeightGradients(const Trunk3& trunk, const FirstLayer& first, const RowShape& shape,
                                 const GradientTargets& targets, const TileKernels& kernels, Allocator& memory)
    : trunk_(trunk),
      first_(first),
      shape_(shape),
      targets_(targets),
      kernels_(kernels),
      ones_(lane_of_ones(kernels.per_lane)) {
  const int hidden = trunk.hidden;
  const std::ptrdiff_t states = RowBlocks(shape, trunk, kernels).rows(0) / shape.samples;
  x_rows_ = memory.take(targets.x ? states * padded(first.inputs, kernels.width) : 0);
  zeros_ = memory.take(padded(first.inputs, kernels.width));
  if (!memory.counting()) std::fill_n(zeros_, padded(first.inputs, kernels.width), 0.0f);
  if (!targets.weights) return;
  w2_ = sum_for(targets.w2, hidden, hidden, memory);
  b2_ = sum_for(targets.b2, 1, hidden, memory);
  w3_ = sum_for(targets.w3, hidden, hidden, memory);
  b3_ = sum_for(targets.b3, 1, hidden, memory);
  w4_ = sum_for(targets.w4, trunk.outputs, hidden, memory);
  b4_ = sum_for(targets.b4, 1, trunk.outputs, memory);
  input_transposed_ = sum_for(nullptr, first.inputs, hidden, memory);
  init_ = sum_for(targets.init_per_state ? nullptr : targets.init, 1, hidden, memory);
  action_transposed_ = sum_for(nullptr, shape.action_dim, hidden, memory);
  tau_ = shape.action_dim ? sum_for(targets.tau, shape.steps, hidden, memory) : Sum{nullptr, 0};
  u_rows_ = memory.take(states * trunk.hidden_padded);
}

void WeightGradients::add(const Tape& tape, const TapeGradients& gradients, std::ptrdiff_t first_row,
                          std::ptrdiff_t rows, int threads) {
  sum_over_samples(gradients, rows);
  if (targets_.weights) {
    add_trunk(tape, gradients, threads);
    add_first_layer(gradients, first_row, rows, threads);
  }
  if (targets_.x) write_x(gradients, first_row, rows, threads);
}

void WeightGradients::add_trunk(const Tape& tape, const TapeGradients& gradients, int threads) {
  const int width = kernels_.width, hidden = trunk_.hidden;
  const std::ptrdiff_t lanes = tape.positions / kernels_.per_lane;  // of the trunk's packed tiles
  const std::ptrdiff_t packed_tile = lanes * width, single_packed_tile = tape.positions * width;
  const float one = 1.0f;
  std::vector<OuterProduct> products = {
      {gradients.hidden3, width, packed_tile, hidden, tape.hidden[1], packed_tile, lanes, w3_.data, w3_.stride, true},
      {gradients.hidden2, width, packed_tile, hidden, tape.hidden[0], packed_tile, lanes, w2_.data, w2_.stride, true},
      {gradients.output, width, packed_tile, trunk_.outputs, tape.hidden[2], packed_tile, lanes, w4_.data, w4_.stride,
       true},
      {&ones_, 0, 0, 1, gradients.hidden3, packed_tile, lanes, b3_.data, b3_.stride, true},
      {&ones_, 0, 0, 1, gradients.hidden2, packed_tile, lanes, b2_.data, b2_.stride, true},
  };
  if (shape_.action_dim) {
    products.push_back({tape.actions, shape_.action_dim, 0, shape_.action_dim, gradients.hidden1, single_packed_tile,
                        tape.positions, action_transposed_.data, action_transposed_.stride, false});
    for (int k = 0; k < shape_.steps; ++k) {
      const std::ptrdiff_t n = k * tape.rows_padded;
      products.push_back({&one, 0, 0, 1, gradients.hidden1 + n * width, single_packed_tile, tape.rows_padded,
                          tau_.data + k * tau_.stride, tau_.stride, false});
    }
  }
  struct Task {
    const OuterProduct* product;
    int first, count;
  };
  std::vector<Task> tasks;
  const int packed_tiles = trunk_.hidden_padded / width;
  for (const OuterProduct& product : products) {
    // Two packed tiles of a matrix are a task; a sum of rows is small enough to be one whole.
    const int group = product.rows == 1 ? packed_tiles : 2;
    for (int first = 0; first < packed_tiles; first += group)
      tasks.push_back({&product, first, std::min(group, packed_tiles - first)});
  }
  const OuterProduct b4{&ones_, 0, 0, 1, gradients.output, packed_tile, lanes, b4_.data, b4_.stride, true};
  tasks.push_back({&b4, 0, trunk_.outputs_padded / width});
  parallel_for(static_cast<int>(tasks.size()), threads, [&](int i) {
    kernels_.outer_product(*tasks[i].product, tasks[i].first, tasks[i].count);
  });
}

// u's gradient over the samples, into the first row of each state.
void WeightGradients::sum_over_samples(const TapeGradients& gradients, std::ptrdiff_t rows) const {
  const int hidden_padded = trunk_.hidden_padded;
  for (std::ptrdiff_t state = 0; shape_.samples > 1 && state < rows / shape_.samples; ++state) {
    float* sum = gradients.u + state * shape_.samples * hidden_padded;
    for (int sample = 1; sample < shape_.samples; ++sample) {
      for (int h = 0; h < hidden_padded; ++h) sum[h] += sum[static_cast<std::ptrdiff_t>(sample) * hidden_padded + h];
    }
  }
}

void WeightGradients::add_first_layer(const TapeGradients& gradients, std::ptrdiff_t first_row, std::ptrdiff_t rows,
                                      int threads) {
  const int width = kernels_.width, hidden_padded = trunk_.hidden_padded, hidden = trunk_.hidden;
  const std::ptrdiff_t states = rows / shape_.samples, first_state = first_row / shape_.samples;
  const std::ptrdiff_t state_stride = static_cast<std::ptrdiff_t>(shape_.samples) * hidden_padded;
  const float one = 1.0f;
  const OuterProduct input{first_.x + first_state * first_.x_stride, first_.x_stride, 0, first_.inputs, u_rows_,
                           states * width, states, input_transposed_.data, input_transposed_.stride, false};
  const OuterProduct bias{&one, 0, 0, 1, u_rows_, states * width, states, init_.data, init_.stride, false};
  const int packed_tiles = hidden_padded / width, tasks = (packed_tiles + 1) / 2;
  parallel_for(tasks, threads, [&](int task) {
    const int first = 2 * task, count = std::min(2, packed_tiles - first);
    for (int p = first; p < first + count; ++p) {
      for (std::ptrdiff_t s = 0; s < states; ++s) {
        std::copy_n(gradients.u + s * state_stride + p * width, width, u_rows_ + (p * states + s) * width);
      }
    }
    kernels_.outer_product(input, first, count);
    kernels_.outer_product(bias, first, count);
  });
  for (std::ptrdiff_t s = 0; targets_.init_per_state && s < states; ++s) {
    std::copy_n(gradients.u + s * state_stride, hidden, targets_.init + (first_state + s) * hidden);
  }
}

void WeightGradients::write_x(const TapeGradients& gradients, std::ptrdiff_t first_row, std::ptrdiff_t rows,
                              int threads) const {
  const std::ptrdiff_t states = rows / shape_.samples, first_state = first_row / shape_.samples;
  const std::ptrdiff_t state_stride = static_cast<std::ptrdiff_t>(shape_.samples) * trunk_.hidden_padded;
  const int inputs_padded = first_.input_transposed.outputs_padded;
  const RowSplit parts(states, 8 * kernels_.max_rows, threads);
  parallel_for(parts.count(), threads, [&](int i) {
    const Part part = parts[i];
    float* to = x_rows_ + part.first * inputs_padded;
    kernels_.dense(first_.input_transposed, gradients.u + part.first * state_stride, state_stride, zeros_, 0, to,
                   inputs_padded, part.rows);
    copy_matrix(to, inputs_padded, part.rows, first_.inputs, targets_.x + (first_state + part.first) * first_.inputs);
  });
}

void WeightGradients::finish() const {
  if (!targets_.weights) return;
  const int hidden = trunk_.hidden;
  const auto write = [](const Sum& sum, int rows, int columns, float* target) {
    if (sum.data != target) copy_matrix(sum.data, sum.stride, rows, columns, target);
  };
  write(w2_, hidden, hidden, targets_.w2);
  write(b2_, 1, hidden, targets_.b2);
  write(w3_, hidden, hidden, targets_.w3);
  write(b3_, 1, hidden, targets_.b3);
  write(w4_, trunk_.outputs, hidden, targets_.w4);
  write(b4_, 1, trunk_.outputs, targets_.b4);
  copy_transposed(input_transposed_.data, input_transposed_.stride, first_.inputs, hidden, targets_.input_weight);
  if (!targets_.init_per_state) write(init_, 1, hidden, targets_.init);
  if (shape_.action_dim) {
    write(tau_, shape_.steps, hidden, targets_.tau);
    copy_transposed(action_transposed_.data, action_transposed_.stride, shape_.action_dim, hidden,
                    targets_.W_a);
  }
}

}  // namespace llmdpd
