#include "packing.h"

#include <algorithm>

namespace llmdpd {
namespace {

PackedLayer pack(const Matrix& matrix, bool transposed, bool in_lanes, const float* bias, const TileKernels& kernels,
                 Allocator& memory) {
  const int per_lane = in_lanes ? kernels.per_lane : 1;
  const int outputs = transposed ? matrix.inputs : matrix.outputs;
  const int inputs = transposed ? matrix.outputs : matrix.inputs;
  const int outputs_padded = padded(outputs, kernels.width);
  const std::ptrdiff_t lanes = (inputs + per_lane - 1) / per_lane;
  float* packed_tiles = memory.take(lanes * outputs_padded);
  if (!memory.counting()) {
    if (outputs == 0) std::fill(packed_tiles, packed_tiles + lanes * outputs_padded, 0.0f);
    kernels.pack(matrix.data, matrix.stride, matrix.outputs, matrix.inputs, transposed, in_lanes, packed_tiles);
  }
  return {packed_tiles, bias, lanes, outputs_padded};
}

}  // namespace

PackedLayer pack_single(const Matrix& matrix, bool transposed, const TileKernels& kernels, Allocator& memory) {
  return pack(matrix, transposed, false, nullptr, kernels, memory);
}

const float* copy_rows_padded(const float* from, int rows, int count, const TileKernels& kernels, Allocator& memory) {
  const int width = padded(count, kernels.width);
  float* to = memory.take(static_cast<std::size_t>(rows) * width);
  for (int r = 0; !memory.counting() && r < rows; ++r) {
    std::copy(from + static_cast<std::ptrdiff_t>(r) * count, from + static_cast<std::ptrdiff_t>(r + 1) * count,
              to + static_cast<std::ptrdiff_t>(r) * width);
    std::fill(to + static_cast<std::ptrdiff_t>(r) * width + count, to + static_cast<std::ptrdiff_t>(r + 1) * width,
              0.0f);
  }
  return to;
}

const float* copy_padded(const float* from, int count, const TileKernels& kernels, Allocator& memory) {
  return copy_rows_padded(from, 1, count, kernels, memory);
}

Trunk3 pack_trunk(const TrunkWeights& weights, Passes passes, const TileKernels& kernels, Allocator& memory) {
  const int hidden = weights.hidden, outputs = weights.outputs;
  const Matrix second{weights.w2, hidden, hidden, hidden}, third{weights.w3, hidden, hidden, hidden};
  const Matrix output{weights.w4, hidden, outputs, hidden};
  Trunk3 trunk{};
  trunk.hidden = hidden;
  trunk.hidden_padded = padded(hidden, kernels.width);
  trunk.outputs = outputs;
  trunk.outputs_padded = padded(outputs, kernels.width);
  if (passes.forward) {
    trunk.second = pack(second, false, true, copy_padded(weights.b2, hidden, kernels, memory), kernels, memory);
    trunk.third = pack(third, false, true, copy_padded(weights.b3, hidden, kernels, memory), kernels, memory);
    trunk.output = pack(output, false, true, copy_padded(weights.b4, outputs, kernels, memory), kernels, memory);
  }
  if (passes.backward) {
    trunk.second_transposed = pack(second, true, true, nullptr, kernels, memory);
    trunk.third_transposed = pack(third, true, true, nullptr, kernels, memory);
    // Few enough inputs that their precision costs nothing.
    trunk.output_transposed = pack(output, true, false, nullptr, kernels, memory);
  }
  return trunk;
}

}  // namespace llmdpd
