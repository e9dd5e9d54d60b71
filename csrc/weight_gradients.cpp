#include "weight_gradients.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "thread_pool.h"

namespace llmdpd {
namespace {

constexpr float kOne = 1.0f;
constexpr int kTaskTiles = 2;  // packed tiles of a matrix that are a task

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
  if (!target || width != columns) return {memory.take(static_cast<std::size_t>(rows) * width), width};
  return {target, columns};
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
                          std::ptrdiff_t rows, int threads, Tasks& tasks) {
  sum_over_samples(gradients, rows);
  if (targets_.weights) {
    add_trunk(tape, gradients, tasks);
    add_first_layer(gradients, first_row, rows, tasks);
    begun_ = true;
  }
  if (targets_.x) write_x(gradients, first_row, rows, threads, tasks);
}

void WeightGradients::add_trunk(const Tape& tape, const TapeGradients& gradients, Tasks& tasks) const {
  const int width = kernels_.width, hidden = trunk_.hidden, packed_tiles = trunk_.hidden_padded / width;
  const std::ptrdiff_t lanes = tape.positions / kernels_.per_lane;  // of the trunk's packed tiles
  const std::ptrdiff_t packed_tile = lanes * width, single_packed_tile = tape.positions * width;
  const auto add = [&](const float* left, std::ptrdiff_t step, std::ptrdiff_t left_packed_tile, int rows,
                       const float* right, const Sum& sum, int columns, int each) {
    const OuterProduct product{left,        step,  left_packed_tile, rows,       right, packed_tile,
                               lanes,       sum.data, sum.stride,    true,       begun_};
    for (int first = 0; first < columns; first += each) {
      const int count = std::min(each, columns - first);
      tasks.push_back([this, product, first, count] { kernels_.outer_product(product, first, count); });
    }
  };
  add(gradients.hidden3, width, packed_tile, hidden, tape.hidden[1], w3_, packed_tiles, kTaskTiles);
  add(gradients.hidden2, width, packed_tile, hidden, tape.hidden[0], w2_, packed_tiles, kTaskTiles);
  // What has few rows is small enough to be one task.
  add(gradients.output, width, packed_tile, trunk_.outputs, tape.hidden[2], w4_, packed_tiles,
      trunk_.outputs < width ? packed_tiles : kTaskTiles);
  add(&ones_, 0, 0, 1, gradients.hidden3, b3_, packed_tiles, packed_tiles);
  add(&ones_, 0, 0, 1, gradients.hidden2, b2_, packed_tiles, packed_tiles);
  const int outputs = trunk_.outputs_padded / width;
  add(&ones_, 0, 0, 1, gradients.output, b4_, outputs, outputs);
  if (!shape_.action_dim) return;
  const OuterProduct actions{tape.actions,       shape_.action_dim,         0,
                             shape_.action_dim,  gradients.hidden1,         single_packed_tile,
                             tape.positions,     action_transposed_.data,   action_transposed_.stride,
                             false,              begun_};
  tasks.push_back([this, actions, packed_tiles] { kernels_.outer_product(actions, 0, packed_tiles); });
  const bool begun = begun_;
  const std::ptrdiff_t rows = tape.rows_padded;
  const float* hidden1 = gradients.hidden1;
  tasks.push_back([=] {
    for (int k = 0; k < shape_.steps; ++k) {
      const OuterProduct of_step{&kOne, 0, 0, 1, hidden1 + k * rows * width, single_packed_tile, rows,
                                 tau_.data + k * tau_.stride, tau_.stride, false, begun};
      kernels_.outer_product(of_step, 0, packed_tiles);
    }
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
                                      Tasks& tasks) const {
  const int width = kernels_.width, hidden_padded = trunk_.hidden_padded, packed_tiles = hidden_padded / width;
  const std::ptrdiff_t states = rows / shape_.samples, first_state = first_row / shape_.samples;
  const std::ptrdiff_t state_stride = static_cast<std::ptrdiff_t>(shape_.samples) * hidden_padded;
  const float* u = gradients.u;
  const OuterProduct input{first_.x + first_state * first_.x_stride, first_.x_stride, 0, first_.inputs, u_rows_,
                           states * width, states, input_transposed_.data, input_transposed_.stride, false, begun_};
  const OuterProduct bias{&kOne, 0, 0, 1, u_rows_, states * width, states, init_.data, init_.stride, false, begun_};
  for (int first = 0; first < packed_tiles; first += kTaskTiles) {
    const int count = std::min(kTaskTiles, packed_tiles - first);
    tasks.push_back([=] {
      for (int p = first; p < first + count; ++p) {
        for (std::ptrdiff_t s = 0; s < states; ++s) {
          std::copy_n(u + s * state_stride + p * width, width, u_rows_ + (p * states + s) * width);
        }
      }
      kernels_.outer_product(input, first, count);
      kernels_.outer_product(bias, first, count);
    });
  }
  if (!targets_.init_per_state) return;
  tasks.push_back([=] {
    for (std::ptrdiff_t s = 0; s < states; ++s) {
      std::copy_n(u + s * state_stride, trunk_.hidden, targets_.init + (first_state + s) * trunk_.hidden);
    }
  });
}

void WeightGradients::write_x(const TapeGradients& gradients, std::ptrdiff_t first_row, std::ptrdiff_t rows, int threads,
                              Tasks& tasks) const {
  const std::ptrdiff_t states = rows / shape_.samples, first_state = first_row / shape_.samples;
  const std::ptrdiff_t state_stride = static_cast<std::ptrdiff_t>(shape_.samples) * trunk_.hidden_padded;
  const int inputs_padded = first_.input_transposed.outputs_padded;
  const RowSplit parts(states, 8 * kernels_.max_rows, threads);
  for (int i = 0; i < parts.count(); ++i) {
    const Part part = parts[i];
    const float* u = gradients.u + part.first * state_stride;
    tasks.push_back([=] {
      float* to = x_rows_ + part.first * inputs_padded;
      kernels_.dense(first_.input_transposed, u, state_stride, zeros_, 0, to, inputs_padded, part.rows);
      copy_matrix(to, inputs_padded, part.rows, first_.inputs,
                  targets_.x + (first_state + part.first) * first_.inputs);
    });
  }
}

void WeightGradients::finish() const {
  if (!targets_.weights) return;
  const int hidden = trunk_.hidden;
  const auto write = [this](const Sum& sum, int rows, int columns, float* target) {
    if (!begun_) std::fill_n(sum.data, rows * sum.stride, 0.0f);  // no row, no sum
    if (sum.data != target) copy_matrix(sum.data, sum.stride, rows, columns, target);
  };
  write(w2_, hidden, hidden, targets_.w2);
  write(b2_, 1, hidden, targets_.b2);
  write(w3_, hidden, hidden, targets_.w3);
  write(b3_, 1, hidden, targets_.b3);
  write(w4_, trunk_.outputs, hidden, targets_.w4);
  write(b4_, 1, trunk_.outputs, targets_.b4);
  if (!begun_) std::fill_n(input_transposed_.data, first_.inputs * input_transposed_.stride, 0.0f);
  copy_transposed(input_transposed_.data, input_transposed_.stride, first_.inputs, hidden, targets_.input_weight);
  if (!targets_.init_per_state) write(init_, 1, hidden, targets_.init);
  if (shape_.action_dim) {
    write(tau_, shape_.steps, hidden, targets_.tau);
    if (!begun_) std::fill_n(action_transposed_.data, shape_.action_dim * action_transposed_.stride, 0.0f);
    copy_transposed(action_transposed_.data, action_transposed_.stride, shape_.action_dim, hidden,
                    targets_.W_a);
  }
}

}  // namespace llmdpd
