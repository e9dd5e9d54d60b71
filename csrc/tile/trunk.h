// The trunk (tile_kernels.h) on a tile of rows, forward and backward, and the first layer before it.
#pragma once

#include "dense.h"
#include "tile_kernels.h"

namespace {

using llmdpd::FirstLayer;
using llmdpd::Tape;
using llmdpd::TapeGradients;
using llmdpd::Trunk3;

// Draws of noise that are made at once for a tile: a vector of counters, four action dimensions each.
inline int draws_at_once(int rows, int action_dim) {
  const int counters = rows * ((action_dim + 3) / 4);
  return (kWidth + counters - 1) / counters;
}

// A tile's memory: all of it lives in the first-level cache or near it through the whole chain.
struct Scratch {
  std::ptrdiff_t stride;  // of a hidden row; one vector more than it needs, so that rows don't share cache sets
  float *u, *z, *lanes, *other_lanes, *zeros;
  float *outputs;                  // of the trunk, or their gradient: [kMaxBlock, outputs_padded]
  float *action, *carry, *padded;  // chain: [kMaxBlock, A] twice, and one padded row of actions a row
  float* noise;                    // chain: the draws made at once
  std::ptrdiff_t floats;

  Scratch(const Trunk3& trunk, int action_dim, float* base) : stride(trunk.hidden_padded + kWidth) {
    const std::ptrdiff_t rows = kMaxBlock, actions = (rows * action_dim + kWidth - 1) / kWidth * kWidth;
    u = base;
    z = u + rows * stride;
    lanes = z + rows * stride;
    other_lanes = lanes + rows * stride;
    zeros = other_lanes + rows * stride;
    outputs = zeros + stride;
    action = outputs + rows * trunk.outputs_padded;
    carry = action + actions;
    padded = carry + actions;
    noise = padded + rows * llmdpd::padded(action_dim, kWidth);
    // Draws of r rows are less than those of one counter vector and one draw more.
    floats = noise + (kWidth + rows) * (action_dim + 3) - base;
  }
};

std::size_t scratch_floats(const Trunk3& trunk, int action_dim) {
  float origin[1];
  return static_cast<std::size_t>(Scratch(trunk, action_dim, origin).floats);
}

inline float* zero_row(const Scratch& scratch, int columns) {
  for (int c = 0; c < columns; c += kWidth) store(scratch.zeros + c, Vec{});
  return scratch.zeros;
}

// u = W_x x (+ W_z z) + init of some states, into scratch.u.
void first_layer(const FirstLayer& first, const Trunk3& trunk, std::ptrdiff_t state, int states,
                 const Scratch& scratch) {
  const int packed_tiles = trunk.hidden_padded / kWidth;
  Init init{first.init, 0};
  const StoreFloat to_u{scratch.u, scratch.stride};
  const Init u{scratch.u, scratch.stride};
  if (first.init_stride != 0) {
    for (int s = 0; s < states; ++s) {
      const float* row = first.init + (state + s) / first.init_share * first.init_stride;
      float* to = scratch.u + s * scratch.stride;
      for (int h = 0; h < trunk.hidden_padded; ++h) to[h] = h < trunk.hidden ? row[h] : 0.0f;
    }
    init = u;
  }
  if (first.prompts) {
    dense<Single, kMaxBlock>(packed_tiles_of(first.prompt),
                             RowInput{first.prompts + state * first.prompt_dim, first.prompt_dim}, init, to_u, states,
                             packed_tiles);
    init = u;
  }
  dense<Single, kMaxBlock>(packed_tiles_of(first.input), RowInput{first.x + state * first.x_stride, first.x_stride},
                           init, to_u, states, packed_tiles);
}

// h = mish(z) of scratch.z: into lanes, and with its slope onto the tape. Two rows at once, as the packed tiles want
// them.
void activate_onto_tape(const Trunk3& trunk, int rows, const Scratch& scratch, float* lanes, const Tape& tape,
                        int layer, std::ptrdiff_t n) {
  const int width = trunk.hidden_padded;
  const std::ptrdiff_t stride = scratch.stride, packed_tile_lanes = tape.positions / Trunk::kPerLane * kWidth;
  for (int r = 0; r < rows; r += 2) {
    const bool pair = r + 1 < rows;
    const float* z = scratch.z + r * stride;
    float* slope = tape.slope[layer] + (n + r) * width;
    for (int c = 0; c < width; c += kWidth) {
      Vec derivative, second{};
      const Vec first = mish(load(z + c), derivative);
      store(slope + c, derivative);
      Trunk::store_lanes(lanes + r * stride, c, first);
      if (pair) {
        second = mish(load(z + stride + c), derivative);
        store(slope + width + c, derivative);
        Trunk::store_lanes(lanes + (r + 1) * stride, c, second);
      }
      Trunk::store_rows(tape.hidden[layer] + c / kWidth * packed_tile_lanes, n + r, first, second);
    }
  }
}

// One hidden layer: lanes <- mish(init + left · layer), and onto the tape where there is one.
template <class Op>
void hidden_layer(const PackedLayer& layer, const RowInput& left, const Init& init, const Trunk3& trunk, int rows,
                  const Scratch& scratch, float* lanes, const Tape* tape, int index, std::ptrdiff_t n) {
  const int packed_tiles = trunk.hidden_padded / kWidth;
  if (!tape) {
    dense<Op, kMaxBlock>(packed_tiles_of(layer), left, init, StoreMish{lanes, scratch.stride}, rows, packed_tiles);
    return;
  }
  dense<Op, kMaxBlock>(packed_tiles_of(layer), left, init, StoreFloat{scratch.z, scratch.stride}, rows, packed_tiles);
  activate_onto_tape(trunk, rows, scratch, lanes, *tape, index, n);
}

// From h1 in scratch.lanes to scratch.outputs.
void trunk_forward(const Trunk3& trunk, int rows, const Scratch& scratch, const Tape* tape, std::ptrdiff_t n) {
  const std::ptrdiff_t stride = scratch.stride;
  hidden_layer<Trunk>(trunk.second, {scratch.lanes, stride}, {trunk.second.bias, 0}, trunk, rows, scratch,
                      scratch.other_lanes, tape, 1, n);
  hidden_layer<Trunk>(trunk.third, {scratch.other_lanes, stride}, {trunk.third.bias, 0}, trunk, rows, scratch,
                      scratch.lanes, tape, 2, n);
  const RowInput h3{scratch.lanes, stride};
  const Init bias{trunk.output.bias, 0};
  const StoreFloat to_outputs{scratch.outputs, trunk.outputs_padded};
  if (trunk.outputs_padded == kWidth) {
    narrow<Trunk>(packed_tiles_of(trunk.output), h3, bias, to_outputs, rows);
  } else {
    dense<Trunk, kMaxBlock>(packed_tiles_of(trunk.output), h3, bias, to_outputs, rows, trunk.outputs_padded / kWidth);
  }
}

// dz = dh mish'(z), dh in scratch.z: as Op's lanes of the next product, and in the weight gradients' packed tiles.
template <class Op>
void through_activation(const Trunk3& trunk, int rows, const Scratch& scratch, const float* slope, float* lanes,
                        float* packed_tiles, std::ptrdiff_t positions, std::ptrdiff_t n) {
  const int width = trunk.hidden_padded;
  const std::ptrdiff_t stride = scratch.stride, packed_tile_lanes = positions / Op::kPerLane * kWidth;
  for (int r = 0; r < rows; r += 2) {
    const bool pair = r + 1 < rows;
    const float* z = scratch.z + r * stride;
    const float* derivative = slope + (n + r) * width;
    for (int c = 0; c < width; c += kWidth) {
      Vec second{};
      const Vec first = load(z + c) * load(derivative + c);
      Op::store_lanes(lanes + r * stride, c, first);
      if (pair) {
        second = load(z + stride + c) * load(derivative + width + c);
        Op::store_lanes(lanes + (r + 1) * stride, c, second);
      }
      Op::store_rows(packed_tiles + c / kWidth * packed_tile_lanes, n + r, first, second);
    }
  }
}

// From the outputs' gradient in scratch.outputs to dz1 in scratch.other_lanes, in fp32.
void trunk_backward(const Trunk3& trunk, int rows, const Scratch& scratch, const Tape& tape, const TapeGradients& to,
                    std::ptrdiff_t n) {
  const std::ptrdiff_t stride = scratch.stride;
  const int packed_tiles = trunk.hidden_padded / kWidth;
  const Init zero{zero_row(scratch, trunk.hidden_padded), 0};
  const StoreFloat to_z{scratch.z, stride};
  const std::ptrdiff_t packed_tile_lanes = tape.positions / Trunk::kPerLane * kWidth;
  for (int r = 0; r < rows; r += 2) {
    const float* from = scratch.outputs + r * trunk.outputs_padded;
    for (int c = 0; c < trunk.outputs_padded; c += kWidth) {
      const Vec second = r + 1 < rows ? load(from + trunk.outputs_padded + c) : Vec{};
      Trunk::store_rows(to.output + c / kWidth * packed_tile_lanes, n + r, load(from + c), second);
    }
  }
  dense<Single, kMaxBlock>(packed_tiles_of(trunk.output_transposed), RowInput{scratch.outputs, trunk.outputs_padded},
                           zero, to_z, rows, packed_tiles);
  through_activation<Trunk>(trunk, rows, scratch, tape.slope[2], scratch.lanes, to.hidden3, tape.positions, n);
  dense<Trunk, kMaxBlock>(packed_tiles_of(trunk.third_transposed), RowInput{scratch.lanes, stride}, zero, to_z, rows,
                          packed_tiles);
  through_activation<Trunk>(trunk, rows, scratch, tape.slope[1], scratch.lanes, to.hidden2, tape.positions, n);
  dense<Trunk, kMaxBlock>(packed_tiles_of(trunk.second_transposed), RowInput{scratch.lanes, stride}, zero, to_z, rows,
                          packed_tiles);
  through_activation<Single>(trunk, rows, scratch, tape.slope[0], scratch.other_lanes, to.hidden1, tape.positions, n);
}

}  // namespace
