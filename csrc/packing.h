// From weights as torch keeps them to the packed tiles that tiles read.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

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

// A sample of a net's weights, to see later whether they were changed in a way that no version counts.
class WeightSample {
 public:
  WeightSample() = default;
  // The first layer's weight [hidden, inputs] and bias, and the trunk's; all of them must stay where they are.
  WeightSample(const float* first_weight, int inputs, const float* first_bias, const TrunkWeights& trunk);
  bool unchanged() const { return fingerprint() == fingerprint_; }

 private:
  struct Part {
    const float* numbers;
    std::ptrdiff_t count;
  };
  std::uint64_t fingerprint() const;

  std::array<Part, 8> parts_{};
  std::uint64_t fingerprint_ = 0;
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
