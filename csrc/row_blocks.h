// A batch goes through the backward pass in row blocks of rows, so that what a row block keeps stays in the cache and
// memory is bounded. Tiles of rows are independent of each other; the weight gradients then sum over the whole row
// block in one fixed order, each sum by one thread: results don't depend on the number of threads.
#pragma once

#include <cstddef>

#include "memory.h"
#include "tile/tile_kernels.h"

namespace llmdpd {

// The rows of a call: states * samples of them, action_dim 0 where there is no chain.
struct RowShape {
  std::ptrdiff_t rows;
  int samples;
  int steps;
  int action_dim;
};

class RowBlocks {
 public:
  RowBlocks(const RowShape& shape, const Trunk3& trunk, const TileKernels& kernels);

  // tape_floats() is at most (rows + row blocks) * row_floats + row blocks * block_floats, row blocks of block_rows
  // rows each.
  struct Sizes {
    std::ptrdiff_t block_rows;
    std::size_t row_floats, block_floats;
  };
  static Sizes sizes(int hidden, int outputs, const RowShape& shape, const TileKernels& kernels);

  std::ptrdiff_t count() const { return shape_.rows == 0 ? 0 : (shape_.rows + block_rows_ - 1) / block_rows_; }
  std::ptrdiff_t first(std::ptrdiff_t block) const { return block * block_rows_; }
  std::ptrdiff_t rows(std::ptrdiff_t block) const;

  // The tape of one row block, and of all, each aligned.
  std::size_t tape_floats(std::ptrdiff_t block) const;
  std::size_t tape_floats() const;
  Tape tape(std::ptrdiff_t block, Allocator& memory) const;
  // The tape of a row block in the memory of all.
  Tape tape_in(std::ptrdiff_t block, float* base) const;
  // What a forward pass does not write and a sum over the row block reads.
  void clear_padding(std::ptrdiff_t block, const Tape& tape) const;
  TapeGradients gradients(std::ptrdiff_t block, Allocator& memory) const;

 private:
  std::ptrdiff_t rows_padded(std::ptrdiff_t block) const { return (rows(block) + 1) / 2 * 2; }

  RowShape shape_;
  int hidden_padded_, outputs_padded_, per_lane_;
  std::ptrdiff_t block_rows_;
};

struct Part {
  std::ptrdiff_t first;
  int rows;
};

// Tiles of at most `max_rows` rows, each begun at an even row: few enough to fill their rows, enough to give every
// thread one that is worth its while, and as many for each.
class RowSplit {
 public:
  RowSplit(std::ptrdiff_t rows, int max_rows, int threads);
  int count() const { return static_cast<int>(parts_); }
  Part operator[](std::ptrdiff_t part) const;

 private:
  std::ptrdiff_t rows_, pairs_, parts_;
};

}  // namespace llmdpd
