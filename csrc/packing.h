// From weights as torch keeps them to the packed tiles that tiles read.
#pragma once

#include <cstddef>

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

PackedLayer pack_single(const Matrix& matrix, bool transposed, const TileKernels& kernels, Allocator& memory);
Trunk3 pack_trunk(const TrunkWeights& weights, Passes passes, const TileKernels& kernels, Allocator& memory);
// `count` floats and zeros up to a multiple of the vector's width.
const float* copy_padded(const float* from, int count, const TileKernels& kernels, Allocator& memory);
// [rows, padded count] of [rows, count].
const float* copy_rows_padded(const float* from, int rows, int count, const TileKernels& kernels, Allocator& memory);

}  // namespace llmdpd
