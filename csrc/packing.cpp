#include "packing.h"

#include <algorithm>

#include "thread_pool.h"

namespace llmdpd {
namespace {

PackedLayer pack(const Matrix& matrix, bool transposed, bool in_lanes, const float* bias, const TileKernels& kernels,
                 Allocator& memory, PackList* later) {
  const int per_lane = in_lanes ? kernels.per_lane : 1;
  const int outputs = transposed ? matrix.inputs : matrix.outputs;
  const int inputs = transposed ? matrix.outputs : matrix.inputs;
  const int outputs_padded = padded(outputs, kernels.width);
  const std::ptrdiff_t lanes = (inputs + per_lane - 1) / per_lane;
  float* packed_tiles = memory.take(lanes * outputs_padded);
  if (!memory.counting()) {
    if (outputs == 0) std::fill(packed_tiles, packed_tiles + lanes * outputs_padded, 0.0f);
    if (later) {
      later->add(matrix, transposed, in_lanes, packed_tiles, lanes);
    } else {
      kernels.pack(matrix.data, matrix.stride, matrix.outputs, matrix.inputs, transposed, in_lanes, packed_tiles);
    }
  }
  return {packed_tiles, bias, lanes, outputs_padded};
}

}  // namespace

void PackList::run(const TileKernels& kernels, int threads) const {
  constexpr std::ptrdiff_t kTask = 1 << 13;  // numbers: some microseconds
  struct Task {
    const Entry* entry;
    int first, count;  // rows of the packed matrix, the first at a packed tile's begin
  };
  std::vector<Task> tasks;
  for (const Entry& entry : entries_) {
    const int outputs = entry.transposed ? entry.matrix.inputs : entry.matrix.outputs;
    const std::ptrdiff_t tile = std::max<std::ptrdiff_t>(entry.lanes, 1) * kernels.width;
    const std::ptrdiff_t rows = std::max<std::ptrdiff_t>(kTask / tile, 1) * kernels.width;
    const int step = static_cast<int>(std::min<std::ptrdiff_t>(rows, std::max(outputs, 1)));
    for (int first = 0; first < outputs; first += step) {
      tasks.push_back({&entry, first, std::min(step, outputs - first)});
    }
  }
  parallel_for(static_cast<int>(tasks.size()), threads, [&](int i) {
    const auto [entry, first, count] = tasks[i];
    const Matrix& matrix = entry->matrix;
    float* to = entry->to + first * entry->lanes;
    if (entry->transposed) {
      kernels.pack(matrix.data + first, matrix.stride, matrix.outputs, count, true, entry->in_lanes, to);
    } else {
      kernels.pack(matrix.data + first * matrix.stride, matrix.stride, count, matrix.inputs, false, entry->in_lanes,
                   to);
    }
  });
}

PackedLayer pack_single(const Matrix& matrix, bool transposed, const TileKernels& kernels, Allocator& memory,
                        PackList* later) {
  return pack(matrix, transposed, false, nullptr, kernels, memory, later);
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

Trunk3 pack_trunk(const TrunkWeights& weights, Passes passes, const TileKernels& kernels, Allocator& memory,
                  PackList* later) {
  const int hidden = weights.hidden, outputs = weights.outputs;
  const Matrix second{weights.w2, hidden, hidden, hidden}, third{weights.w3, hidden, hidden, hidden};
  const Matrix output{weights.w4, hidden, outputs, hidden};
  Trunk3 trunk{};
  trunk.hidden = hidden;
  trunk.hidden_padded = padded(hidden, kernels.width);
  trunk.outputs = outputs;
  trunk.outputs_padded = padded(outputs, kernels.width);
  if (passes.forward) {
    trunk.second = pack(second, false, true, copy_padded(weights.b2, hidden, kernels, memory), kernels, memory, later);
    trunk.third = pack(third, false, true, copy_padded(weights.b3, hidden, kernels, memory), kernels, memory, later);
    trunk.output = pack(output, false, true, copy_padded(weights.b4, outputs, kernels, memory), kernels, memory, later);
  }
  if (passes.backward) {
    trunk.second_transposed = pack(second, true, true, nullptr, kernels, memory, later);
    trunk.third_transposed = pack(third, true, true, nullptr, kernels, memory, later);
    // Few enough inputs that their precision costs nothing.
    trunk.output_transposed = pack(output, true, false, nullptr, kernels, memory, later);
  }
  return trunk;
}

}  // namespace llmdpd
