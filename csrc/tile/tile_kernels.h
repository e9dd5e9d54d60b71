// What an object of one instruction set and precision offers, and the structures that it shares with its callers. All
// numbers are float32; matrices are row-major. "Lanes" are 32 bits that hold one operand of the trunk, or two bfloat16
// (lanes.h); "packed tiles" are [packed tile][k][width] lanes, width the vector's.
//
// The trunk is what follows a first layer's pre-activation z1 [H]: h1 = mish(z1), h2 = mish(W2 h1 + b2),
// h3 = mish(W3 h2 + b3), out = W4 h3 + b4. The noise network and both critics are trunks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace llmdpd {

// A weight matrix [outputs, inputs] in packed tiles over its outputs, zero beyond them; `lanes` along the inputs.
struct PackedLayer {
  const float* packed_tiles;
  const float* bias;  // [padded outputs], or null
  std::ptrdiff_t lanes;
  int outputs_padded;
};

struct Trunk3 {
  int hidden, hidden_padded;
  int outputs, outputs_padded;
  PackedLayer second, third, output;
  PackedLayer second_transposed, third_transposed, output_transposed;  // where gradients are asked for
};

// One row of the sampler's table, in the order used: x0 = clip(p a + e eps); next = A a + B x0 + C x0_previous + S xi.
struct StepCoefficients {
  float p, e, A, B, C, S;
};

// Keys of the counter-based noise.
struct NoiseKeys {
  const std::uint64_t* keys;
  bool per_state;  // then keys[state] and row = sample; else keys[0] and row = state * samples + sample
  int samples;
  int action_dim;
};

// The first layer's part that does not change along the chain: u = W_x x + init, once a state.
struct FirstLayer {
  PackedLayer input;             // W_x, fp32
  PackedLayer input_transposed;  // for the gradient of x
  const float* x;                // [states, inputs]
  std::ptrdiff_t x_stride;
  int inputs;
  PackedLayer prompt;    // W_z where each state has a prompt of its own (then init is b1), else no packed tiles
  const float* prompts;  // [states, Z] or null
  int prompt_dim;
  const float* init;           // [padded hidden], or [states / init_share, H]
  std::ptrdiff_t init_stride;  // 0: shared by all
  int init_share;              // states that share a row of init
};

// What the forward pass keeps for the backward pass of a row block of rows: position n = step * rows_padded + row,
// rows_padded even, padding zero. Packed tiles [hidden_padded / width][n][width].
struct Tape {
  std::ptrdiff_t rows_padded;
  std::ptrdiff_t positions;  // steps * rows_padded
  float* hidden[3];          // h1, h2, h3: packed tiles in lanes
  float* slope[3];           // mish'(z): [positions, padded hidden]
  float* actions;            // chain only: a_k, [positions, A]
  float* unclipped;          // chain only: 1 where x0 was within the bound, [positions, A]
  float* final_unclipped;    // chain only: 1 where a_0 was within the bound, [rows_padded, A]
};

// What the backward pass of a row block leaves for its weight gradients, beside the tape.
struct TapeGradients {
  float* output;   // of the trunk's outputs: packed tiles in lanes over padded outputs
  float* hidden3;  // of z3, z2: packed tiles in lanes
  float* hidden2;
  float* hidden1;  // of z1: packed tiles in fp32
  float* u;        // of u, summed over the steps: [rows_padded, padded hidden]
};

// A chain over the rows state * samples + sample. Prepared once a call.
struct Chain {
  Trunk3 trunk;
  FirstLayer first;
  int action_dim;
  int steps;
  int samples;
  float start;  // scale of the start noise
  float clip;   // infinity where there is none
  PackedLayer action;             // W_a, fp32
  PackedLayer action_transposed;  // for gradients
  const float* tau;         // [steps, padded hidden]
  const StepCoefficients* table;
  const float* noise;             // [steps + 1, rows, A], or null: drawn from `keys`
  NoiseKeys keys;
  std::ptrdiff_t rows;
  float* actions;  // [rows, A]
};

// The trunk on its first layer alone: a critic, or the noise network in the diffusion loss.
struct Mlp {
  Trunk3 trunk;
  FirstLayer first;
  std::ptrdiff_t rows;
  float* out;  // [rows, outputs]
};

// out[rows, columns] (+)= sum over k of left[k][row] right[k][column]: a weight gradient.
struct OuterProduct {
  const float* left;
  std::ptrdiff_t left_step;   // lanes from one k to the next; 0 repeats
  std::ptrdiff_t left_packed_tile;  // lanes from one packed tile of rows to the next; 0 where all rows lie in one
  int rows;
  const float* right;  // packed tiles
  std::ptrdiff_t right_packed_tile;
  std::ptrdiff_t lanes;  // along k
  float* out;
  std::ptrdiff_t out_stride;
  bool in_lanes;  // of the trunk's precision; else fp32
  bool add;       // to what is there
};

struct TileKernels {
  int width;     // floats in a vector: outputs are padded to a multiple of it
  int max_rows;  // rows that a tile may have
  int per_lane;  // numbers in a lane of the trunk

  // packed tiles[ceil(outputs / width)][inputs][width] of weights [outputs, inputs], `stride` floats from row to row;
  // in the trunk's lanes where asked. `transposed` packs its transpose, [ceil(inputs / width)][outputs][width].
  void (*pack)(const float* weights, std::ptrdiff_t stride, int outputs, int inputs, bool transposed, bool in_lanes,
               float* packed_tiles);
  // out[r] = init[r] + W x[r] in fp32, without activation; init_stride 0 shares one row. Rows up to any number.
  void (*dense)(const PackedLayer& layer, const float* x, std::ptrdiff_t x_stride, const float* init,
                std::ptrdiff_t init_stride, float* out, std::ptrdiff_t out_stride, std::ptrdiff_t rows);

  // Standard normals [draws, rows, A] of rows first_row … and draws first_draw ….
  void (*normals)(const NoiseKeys& keys, std::ptrdiff_t first_row, int rows, int first_draw, int draws, float* out);

  // Scratch of one thread, in floats; its base is aligned to 64 bytes.
  std::size_t (*scratch_floats)(const Trunk3& trunk, int action_dim);
  // Rows first_row … first_row + rows - 1, rows <= max_rows. With a tape: of a row block that begins at row
  // block_first; first_row - block_first is even, and rows too unless the row block ends with them.
  void (*chain_forward)(const Chain& chain, std::ptrdiff_t first_row, int rows, const Tape* tape,
                        std::ptrdiff_t block_first, float* scratch);
  void (*chain_backward)(const Chain& chain, const float* grad_actions, std::ptrdiff_t first_row, int rows,
                         const Tape& tape, const TapeGradients& gradients, std::ptrdiff_t block_first, float* scratch);
  void (*mlp_forward)(const Mlp& mlp, std::ptrdiff_t first_row, int rows, const Tape* tape, std::ptrdiff_t block_first,
                      float* scratch);
  void (*mlp_backward)(const Mlp& mlp, const float* grad_out, std::ptrdiff_t first_row, int rows, const Tape& tape,
                       const TapeGradients& gradients, std::ptrdiff_t block_first, float* scratch);
  // Packed tiles first … first + count - 1 of the outer product's columns.
  void (*outer_product)(const OuterProduct& product, int first, int count);
};

// Smallest multiple of `width` that holds `count`, at least one vector.
constexpr int padded(int count, int width) { return count <= width ? width : (count + width - 1) / width * width; }

}  // namespace llmdpd
