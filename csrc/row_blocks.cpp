#include "row_blocks.h"

#include <algorithm>

namespace llmdpd {
namespace {

// Positions (row and step) of a row block. At width 256 its tape and gradients are 12 MB: within a third-level cache,
// and long enough sums for the weight gradients.
constexpr std::ptrdiff_t kBlockPositions = 1280;

}  // namespace

RowBlocks::RowBlocks(const RowShape& shape, const Trunk3& trunk, const TileKernels& kernels)
    : shape_(shape),
      hidden_padded_(trunk.hidden_padded),
      outputs_padded_(trunk.outputs_padded),
      per_lane_(kernels.per_lane) {
  // Whole states, so that a sum over a state's samples stays within a row block.
  const std::ptrdiff_t states = kBlockPositions / (static_cast<std::ptrdiff_t>(shape.steps) * shape.samples);
  block_rows_ = std::max<std::ptrdiff_t>(states, 1) * shape.samples;
}

RowBlocks::Sizes RowBlocks::sizes(int hidden, int outputs, const RowShape& shape, const TileKernels& kernels) {
  Trunk3 trunk{};
  trunk.hidden_padded = padded(hidden, kernels.width);
  trunk.outputs_padded = padded(outputs, kernels.width);
  const RowBlocks blocks(shape, trunk, kernels);
  // h1 to h3, their slopes, a_k and whether it was clipped; the final clip; and the alignment of these nine.
  const std::size_t position =
      3 * trunk.hidden_padded + 3 * trunk.hidden_padded / kernels.per_lane + 2 * shape.action_dim;
  return {blocks.block_rows_, shape.steps * position + shape.action_dim, 9 * 16};
}

std::ptrdiff_t RowBlocks::rows(std::ptrdiff_t block) const { return std::min(block_rows_, shape_.rows - first(block)); }

Tape RowBlocks::tape(std::ptrdiff_t block, Allocator& memory) const {
  Tape tape{};
  tape.rows_padded = rows_padded(block);
  tape.positions = tape.rows_padded * shape_.steps;
  const std::size_t numbers = tape.positions * hidden_padded_;
  for (float*& part : tape.hidden) part = memory.take(numbers / per_lane_);
  for (float*& part : tape.slope) part = memory.take(numbers);
  tape.actions = memory.take(tape.positions * shape_.action_dim);
  tape.unclipped = memory.take(tape.positions * shape_.action_dim);
  tape.final_unclipped = memory.take(tape.rows_padded * shape_.action_dim);
  return tape;
}

void RowBlocks::clear_padding(std::ptrdiff_t block, const Tape& tape) const {
  if (tape.rows_padded == rows(block)) return;
  for (int k = 0; k < shape_.steps; ++k) {
    std::fill_n(tape.actions + (k * tape.rows_padded + rows(block)) * shape_.action_dim, shape_.action_dim, 0.0f);
  }
}

std::size_t RowBlocks::tape_floats(std::ptrdiff_t block) const {
  Allocator count(nullptr);
  tape(block, count);
  return count.used();
}

std::size_t RowBlocks::tape_floats() const {
  const std::ptrdiff_t blocks = count();
  return blocks == 0 ? 0 : static_cast<std::size_t>(blocks - 1) * tape_floats(0) + tape_floats(blocks - 1);
}

Tape RowBlocks::tape_in(std::ptrdiff_t block, float* base) const {
  Allocator memory(base + block * tape_floats(0));
  return tape(block, memory);
}

TapeGradients RowBlocks::gradients(std::ptrdiff_t block, Allocator& memory) const {
  const std::size_t positions = rows_padded(block) * shape_.steps;
  TapeGradients to{};
  to.output = memory.take(positions * outputs_padded_ / per_lane_);
  to.hidden3 = memory.take(positions * hidden_padded_ / per_lane_);
  to.hidden2 = memory.take(positions * hidden_padded_ / per_lane_);
  to.hidden1 = memory.take(positions * hidden_padded_);
  to.u = memory.take(rows_padded(block) * hidden_padded_);
  return to;
}

RowSplit::RowSplit(std::ptrdiff_t rows, int max_rows, int threads) : rows_(rows), pairs_((rows + 1) / 2) {
  constexpr std::ptrdiff_t kWorthwhilePairs = 3;
  const std::ptrdiff_t max_pairs = max_rows / 2;
  parts_ = (pairs_ + max_pairs - 1) / max_pairs;
  parts_ = std::max(parts_, std::min<std::ptrdiff_t>(threads, pairs_ / kWorthwhilePairs));
  if (parts_ > threads) parts_ = (parts_ + threads - 1) / threads * threads;
  parts_ = std::min(parts_, pairs_);
}

Part RowSplit::operator[](std::ptrdiff_t part) const {
  const std::ptrdiff_t first = 2 * (pairs_ * part / parts_), last = std::min(rows_, 2 * (pairs_ * (part + 1) / parts_));
  return {first, static_cast<int>(last - first)};
}

}  // namespace llmdpd
