// A batch goes through the backward pass in waves of rows, so that what a wave keeps stays in the cache and memory is
// bounded. Tiles of rows are independent of each other; the weight gradients then sum over the whole wave in one fixed
// order, each sum by one thread: results don't depend on the number of threads.
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

class Waves {
 public:
  Waves(const RowShape& shape, const Trunk3& trunk, const TileKernels& kernels);

  // tape_floats() is at most (rows + waves) * row_floats + waves * wave_floats, waves of wave_rows rows each.
  struct Sizes {
    std::ptrdiff_t wave_rows;
    std::size_t row_floats, wave_floats;
  };
  static Sizes sizes(int hidden, int outputs, const RowShape& shape, const TileKernels& kernels);

  std::ptrdiff_t count() const { return shape_.rows == 0 ? 0 : (shape_.rows + wave_rows_ - 1) / wave_rows_; }
  std::ptrdiff_t first(std::ptrdiff_t wave) const { return wave * wave_rows_; }
  std::ptrdiff_t rows(std::ptrdiff_t wave) const;

  // The tape of one wave, and of all, each aligned.
  std::size_t tape_floats(std::ptrdiff_t wave) const;
  std::size_t tape_floats() const;
  Tape tape(std::ptrdiff_t wave, Allocator& memory) const;
  // The tape of a wave in the memory of all.
  Tape tape_in(std::ptrdiff_t wave, float* base) const;
  // What a forward pass does not write and a sum over the wave reads.
  void clear_padding(std::ptrdiff_t wave, const Tape& tape) const;
  TapeGradients gradients(std::ptrdiff_t wave, Allocator& memory) const;

 private:
  std::ptrdiff_t rows_padded(std::ptrdiff_t wave) const { return (rows(wave) + 1) / 2 * 2; }

  RowShape shape_;
  int hidden_padded_, outputs_padded_, per_word_;
  std::ptrdiff_t wave_rows_;
};

struct Part {
  std::ptrdiff_t first;
  int rows;
};

// Tiles of at most `max_rows` rows, each begun at an even row: few enough to fill their rows, enough to give every thread
// one that is worth its while, and as many for each.
class RowSplit {
 public:
  RowSplit(std::ptrdiff_t rows, int max_rows, int threads);
  int count() const { return static_cast<int>(parts_); }
  Part operator[](std::ptrdiff_t part) const;

 private:
  std::ptrdiff_t rows_, pairs_, parts_;
};

}  // namespace llmdpd
