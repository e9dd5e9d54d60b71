// From weights as torch keeps them to the packed tiles that tiles read.
#pragma once

#include <cstddef>
#include <vector>

#include "memory.h"
#include "tile/tile_kernels.h"

namespace llmdpd {

// [outputs, inputs], row-major, `stride` floats from row to row (a slice of columns has more than inputs).
struct Matrix {
  const float* data;
  std::ptrdiff_t stride;
  int outputs, inputs;
};

struct TrunkWeights {
  int hidden, outputs;
  const float *w2, *b2, *w3, *b3, *w4, *b4;  // contiguous
};

// For which passes weights are packed.
struct Passes {
  bool forward, backward;
};

// Weights that a call reads and that have their places already: packed together, by several threads.
class PackList {
 public:
  void add(const Matrix& matrix, bool transposed, bool in_lanes, float* to, std::ptrdiff_t lanes) {
    entries_.push_back({matrix, transposed, in_lanes, to, lanes});
  }
  void run(const TileKernels& kernels, int threads) const;

 private:
  struct Entry {
    Matrix matrix;
    bool transposed, in_lanes;
    float* to;
    std::ptrdiff_t lanes;
  };
  std::vector<Entry> entries_;
};

// `later`, where there is one, is to pack what is else packed at once.
PackedLayer pack_single(const Matrix& matrix, bool transposed, const TileKernels& kernels, Allocator& memory,
                        PackList* later = nullptr);
Trunk3 pack_trunk(const TrunkWeights& weights, Passes passes, const TileKernels& kernels, Allocator& memory,
                  PackList* later = nullptr);
// `count` floats and zeros up to a multiple of the vector's width.
const float* copy_padded(const float* from, int count, const TileKernels& kernels, Allocator& memory);
// [rows, padded count] of [rows, count].
const float* copy_rows_padded(const float* from, int rows, int count, const TileKernels& kernels, Allocator& memory);

}  // namespace llmdpd
