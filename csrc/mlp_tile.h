// What an instruction set's object offers: packing of a weight matrix, one dense layer over rows, and the reverse chain
// of a tile of rows. All pointers are to float32; matrices are row-major.
#pragma once

#include <cstddef>
#include <cstdint>

namespace llmdpd {

// A weight matrix [outputs, inputs] in panels [ceil(outputs / W)][inputs][W], W the vector width, zero beyond `outputs`.
struct PackedLayer {
  const float* panels;
  const float* bias;  // [padded outputs]
  int inputs;
  int outputs;
};

// One row of the sampler's table, in the order used: x0 = clip(p a + e eps); next a = A a + B x0 + C x0_previous + S xi.
struct StepCoefficients {
  float p, e, A, B, C, S;
};

// Everything a tile needs, prepared once a call. Row r of the chain is sample r % samples of state r / samples.
struct ReverseProblem {
  int hidden_padded;
  int action_dim;
  int action_padded;
  int state_dim;
  int prompt_dim;
  int steps;
  int samples;
  float start;  // scale of the start noise
  float clip;   // infinity where there is none

  PackedLayer state_layer;   // W_s
  PackedLayer prompt_layer;  // W_z
  PackedLayer action_layer;  // W_a
  PackedLayer second, third, output;

  const float* context_base;  // [padded hidden]: b1, with W_z z where all rows share one prompt
  const float* time_rows;     // [steps, padded hidden]
  const StepCoefficients* table;

  const float* states;   // [B, S]
  const float* prompts;  // [B, Z], or null where it is in context_base
  const float* noise;    // [steps + 1, rows, A], or null: drawn from `keys`
  const std::uint64_t* keys;
  bool key_per_state;  // then keys[state] and row = sample; else keys[0] and row = state * samples + sample
  std::ptrdiff_t rows;
  float* actions;  // [rows, A]
};

struct TileKernels {
  int width;     // floats in a vector: outputs are padded to a multiple of it
  int max_rows;  // rows a tile may have

  // Destination: padded_outputs * inputs floats. `weights` has `stride` floats from one output's row to the next.
  void (*pack)(const float* weights, std::ptrdiff_t stride, int outputs, int inputs, float* panels);
  // out[r] = init[r] + W x[r], without activation; init_stride 0 shares one init row.
  void (*dense)(const PackedLayer& layer, const float* x, std::ptrdiff_t x_stride, const float* init,
                std::ptrdiff_t init_stride, float* out, std::ptrdiff_t out_stride, int rows);
  std::size_t (*scratch_floats)(const ReverseProblem& problem);
  // Rows first_row .. first_row + rows - 1, rows <= max_rows. Scratch is aligned to 64 bytes.
  void (*run_tile)(const ReverseProblem& problem, std::ptrdiff_t first_row, int rows, float* scratch);
};

// Smallest multiple of `width` that holds `count`, at least one vector.
constexpr int padded(int count, int width) { return count <= width ? width : (count + width - 1) / width * width; }

}  // namespace llmdpd
