// The chain and the three-layer net on a tile of rows. Compiled once for each instruction set and precision, LLMDPD_ISA
// naming the namespace.
#include "noise.h"
#include "pack.h"
#include "trunk.h"

namespace llmdpd::LLMDPD_ISA {
namespace {

// Written so that a NaN passes.
inline float clamp(float x, float bound) { return x > bound ? bound : x < -bound ? -bound : x; }

struct Tile {
  const Chain& chain;
  std::ptrdiff_t first_row;
  int rows;
  const Tape* tape;
  std::ptrdiff_t tape_row;  // of first_row
  Scratch scratch;
  float* actions;
  int drawn_from = 0, drawn = 0;  // draws that scratch.noise holds

  // The normals of a draw, [rows, A]; draws are asked for in ascending order. A vector's worth of them is made at once.
  const float* noise(int draw) {
    if (chain.noise) return chain.noise + (draw * chain.rows + first_row) * chain.action_dim;
    if (draw >= drawn_from + drawn) {
      const int left = chain.steps + 1 - draw, wanted = draws_at_once(rows, chain.action_dim);
      drawn_from = draw;
      drawn = wanted < left ? wanted : left;
      normals(chain.keys, first_row, rows, draw, drawn, scratch.noise);
    }
    return scratch.noise + (draw - drawn_from) * rows * chain.action_dim;
  }

  std::ptrdiff_t position(int k) const { return tape ? k * tape->rows_padded + tape_row : 0; }
};

// eps of the tile's rows at step k, into scratch.outputs.
void predict_noise(const Tile& tile, int k) {
  const Chain& chain = tile.chain;
  const Scratch& scratch = tile.scratch;
  const std::ptrdiff_t first_state = tile.first_row / chain.samples;
  const float* tau_k = chain.tau + static_cast<std::ptrdiff_t>(k) * chain.trunk.hidden_padded;
  for (int r = 0; r < tile.rows; ++r) {
    const float* u = scratch.u + ((tile.first_row + r) / chain.samples - first_state) * scratch.stride;
    for (int h = 0; h < chain.trunk.hidden_padded; h += kWidth) {
      store(scratch.z + r * scratch.stride + h, load(u + h) + load(tau_k + h));
    }
  }
  hidden_layer<Single>(chain.action, {tile.actions, chain.action_dim}, {scratch.z, scratch.stride}, chain.trunk,
                       tile.rows, scratch, scratch.lanes, tile.tape, 0, tile.position(k));
  trunk_forward(chain.trunk, tile.rows, scratch, tile.tape, tile.position(k));
}

// x0 = clip(p a + e eps); a = A a + B x0 + C x0_previous + S xi, in place.
void update_actions(Tile& tile, int k) {
  const Chain& chain = tile.chain;
  const StepCoefficients c = chain.table[k];
  const float* noise = c.S != 0.0f ? tile.noise(k + 1) : nullptr;
  for (int r = 0; r < tile.rows; ++r) {
    float* a = tile.actions + r * chain.action_dim;
    float* x0 = tile.scratch.carry + r * chain.action_dim;
    const float* epsilon = tile.scratch.outputs + r * chain.trunk.outputs_padded;
    const float* xi = noise ? noise + r * chain.action_dim : nullptr;
    const std::ptrdiff_t kept = (tile.position(k) + r) * chain.action_dim;
    for (int i = 0; i < chain.action_dim; ++i) {
      float predicted = c.p * a[i] + c.e * epsilon[i];
      if (tile.tape) {
        tile.tape->actions[kept + i] = a[i];
        tile.tape->unclipped[kept + i] = predicted <= chain.clip && predicted >= -chain.clip ? 1.0f : 0.0f;
      }
      predicted = clamp(predicted, chain.clip);
      a[i] = c.A * a[i] + c.B * predicted + c.C * x0[i];
      if (xi) a[i] += c.S * xi[i];
      x0[i] = predicted;
    }
  }
}

void chain_forward(const Chain& chain, std::ptrdiff_t first_row, int rows, const Tape* tape, std::ptrdiff_t block_first,
                   float* memory) {
  Tile tile{chain, first_row, rows, tape, first_row - block_first, Scratch(chain.trunk, chain.action_dim, memory),
            chain.actions + first_row * chain.action_dim};
  const Scratch& scratch = tile.scratch;
  const std::ptrdiff_t first_state = first_row / chain.samples;
  const std::ptrdiff_t last_state = (first_row + rows - 1) / chain.samples;
  first_layer(chain.first, chain.trunk, first_state, static_cast<int>(last_state - first_state + 1), scratch);
  const float* start = tile.noise(0);
  for (int i = 0; i < rows * chain.action_dim; ++i) {
    tile.actions[i] = chain.start * start[i];
    scratch.carry[i] = 0.0f;
  }
  for (int k = 0; k < chain.steps; ++k) {
    predict_noise(tile, k);
    update_actions(tile, k);
  }
  for (int i = 0; i < rows * chain.action_dim; ++i) {
    const float a = tile.actions[i];
    if (tape) {
      tape->final_unclipped[tile.tape_row * chain.action_dim + i] = a <= chain.clip && a >= -chain.clip ? 1.0f : 0.0f;
    }
    tile.actions[i] = clamp(a, chain.clip);
  }
}

// The gradient of one step's update: from that of a_{k-1} in scratch.action and what later steps send to this step's x0
// in scratch.carry, to eps's in scratch.outputs and a_k's direct part in scratch.action.
void update_backward(const Tile& tile, int k) {
  const Chain& chain = tile.chain;
  const StepCoefficients c = chain.table[k];
  const Scratch& scratch = tile.scratch;
  for (int r = 0; r < tile.rows; ++r) {
    float* d_epsilon = scratch.outputs + r * chain.trunk.outputs_padded;
    const float* unclipped = tile.tape->unclipped + (tile.position(k) + r) * chain.action_dim;
    for (int i = 0; i < chain.action_dim; ++i) {
      float& g = scratch.action[r * chain.action_dim + i];
      float& carry = scratch.carry[r * chain.action_dim + i];
      const float d_predicted = unclipped[i] * (c.B * g + carry);
      carry = c.C * g;
      d_epsilon[i] = c.e * d_predicted;
      g = c.A * g + c.p * d_predicted;
    }
    for (int i = chain.action_dim; i < chain.trunk.outputs_padded; ++i) d_epsilon[i] = 0.0f;
  }
}

void chain_backward(const Chain& chain, const float* grad_actions, std::ptrdiff_t first_row, int rows, const Tape& tape,
                    const TapeGradients& gradients, std::ptrdiff_t block_first, float* memory) {
  const Tile tile{
      chain, first_row, rows, &tape, first_row - block_first, Scratch(chain.trunk, chain.action_dim, memory), nullptr};
  const Scratch& scratch = tile.scratch;
  const int width = chain.trunk.hidden_padded, action_padded = padded(chain.action_dim, kWidth);
  for (int i = 0; i < rows * chain.action_dim; ++i) {
    scratch.action[i] = grad_actions[first_row * chain.action_dim + i] *
                        tape.final_unclipped[tile.tape_row * chain.action_dim + i];
    scratch.carry[i] = 0.0f;
  }
  for (int r = 0; r < rows; ++r) {
    for (int h = 0; h < width; h += kWidth) store(gradients.u + (tile.tape_row + r) * width + h, Vec{});
  }
  for (int k = chain.steps - 1; k >= 0; --k) {
    update_backward(tile, k);
    trunk_backward(chain.trunk, rows, scratch, tape, gradients, tile.position(k));
    for (int r = 0; r < rows; ++r) {
      float* u = gradients.u + (tile.tape_row + r) * width;
      for (int h = 0; h < width; h += kWidth) {
        store(u + h, load(u + h) + load(scratch.other_lanes + r * scratch.stride + h));
      }
      for (int i = 0; i < action_padded; ++i) {
        scratch.padded[r * action_padded + i] = i < chain.action_dim ? scratch.action[r * chain.action_dim + i] : 0.0f;
      }
    }
    dense<Single, kMaxBlock>(packed_tiles_of(chain.action_transposed), RowInput{scratch.other_lanes, scratch.stride},
                             Init{scratch.padded, action_padded}, StoreFloat{scratch.padded, action_padded}, rows,
                             action_padded / kWidth);
    for (int r = 0; r < rows; ++r) {
      for (int i = 0; i < chain.action_dim; ++i) {
        scratch.action[r * chain.action_dim + i] = scratch.padded[r * action_padded + i];
      }
    }
  }
}

void mlp_forward(const Mlp& mlp, std::ptrdiff_t first_row, int rows, const Tape* tape, std::ptrdiff_t block_first,
                 float* memory) {
  const Scratch scratch(mlp.trunk, 0, memory);
  const std::ptrdiff_t n = first_row - block_first;
  first_layer(mlp.first, mlp.trunk, first_row, rows, scratch);
  for (int r = 0; r < rows; ++r) {
    for (int h = 0; h < mlp.trunk.hidden_padded; h += kWidth) {
      const Vec z = load(scratch.u + r * scratch.stride + h);
      if (tape) {
        store(scratch.z + r * scratch.stride + h, z);
      } else {
        Trunk::store_lanes(scratch.lanes + r * scratch.stride, h, mish(z));
      }
    }
  }
  if (tape) activate_onto_tape(mlp.trunk, rows, scratch, scratch.lanes, *tape, 0, n);
  trunk_forward(mlp.trunk, rows, scratch, tape, n);
  for (int r = 0; r < rows; ++r) {
    for (int o = 0; o < mlp.trunk.outputs; ++o) {
      mlp.out[(first_row + r) * mlp.trunk.outputs + o] = scratch.outputs[r * mlp.trunk.outputs_padded + o];
    }
  }
}

void mlp_backward(const Mlp& mlp, const float* grad_out, std::ptrdiff_t first_row, int rows, const Tape& tape,
                  const TapeGradients& gradients, std::ptrdiff_t block_first, float* memory) {
  const Scratch scratch(mlp.trunk, 0, memory);
  const int outputs = mlp.trunk.outputs, width = mlp.trunk.hidden_padded;
  const std::ptrdiff_t n = first_row - block_first;
  for (int r = 0; r < rows; ++r) {
    float* d_out = scratch.outputs + r * mlp.trunk.outputs_padded;
    for (int o = 0; o < mlp.trunk.outputs_padded; ++o) {
      d_out[o] = o < outputs ? grad_out[(first_row + r) * outputs + o] : 0.0f;
    }
  }
  trunk_backward(mlp.trunk, rows, scratch, tape, gradients, n);
  for (int r = 0; r < rows; ++r) {
    for (int h = 0; h < width; h += kWidth) {
      store(gradients.u + (n + r) * width + h, load(scratch.other_lanes + r * scratch.stride + h));
    }
  }
}

void dense_any(const PackedLayer& layer, const float* x, std::ptrdiff_t x_stride, const float* init,
               std::ptrdiff_t init_stride, float* out, std::ptrdiff_t out_stride, std::ptrdiff_t rows) {
  for (std::ptrdiff_t first = 0; first < rows; first += kMaxBlock) {
    const int count = static_cast<int>(rows - first < kMaxBlock ? rows - first : kMaxBlock);
    ::dense<Single, kMaxBlock>(packed_tiles_of(layer), RowInput{x + first * x_stride, x_stride},
                               Init{init + first * init_stride, init_stride},
                               StoreFloat{out + first * out_stride, out_stride}, count, layer.outputs_padded / kWidth);
  }
}

// Half a packed tile of rows by two packed tiles of columns are accumulators enough, and the rows of a block lie in one
// packed tile.
constexpr int kOuterRows = kWidth >= 8 ? kWidth / 2 : kWidth;
// Lanes along k at once: two packed tiles of them and one of rows stay in the first-level cache.
constexpr std::ptrdiff_t kOuterLanes = 256;

// The lanes outermost: what of `left` belongs to some of them then stays in the second-level cache for all packed tiles.
template <class Op>
void outer_product_in(const OuterProduct& product, int first, int count) {
  const int group = product.rows == 1 ? kMaxPackedTiles : 2;
  const float zeros[kMaxPackedTiles * kWidth] = {};
  for (std::ptrdiff_t k = 0; k < product.lanes; k += kOuterLanes) {
    const std::ptrdiff_t lanes = product.lanes - k < kOuterLanes ? product.lanes - k : kOuterLanes;
    for (int packed_tile = first; packed_tile < first + count; packed_tile += group) {
      const int packed_tiles = first + count - packed_tile < group ? first + count - packed_tile : group;
      float* out = product.out + packed_tile * kWidth;
      const PackedTiles right{product.right + packed_tile * product.right_packed_tile + k * kWidth,
                              product.right_packed_tile, lanes};
      for (int row = 0; row < product.rows; row += kOuterRows) {
        const int rows = product.rows - row < kOuterRows ? product.rows - row : kOuterRows;
        const float* left = product.left + k * product.left_step +
                            (product.left_packed_tile ? row / kWidth * product.left_packed_tile + row % kWidth : row);
        float* to = out + row * product.out_stride;
        const Init init = k == 0 && !product.add ? Init{zeros, 0} : Init{to, product.out_stride};
        ::dense<Op, kOuterRows>(right, ColumnInput{left, product.left_step}, init,
                                StoreFloat{to, product.out_stride}, rows, packed_tiles);
      }
    }
  }
}

void outer_product(const OuterProduct& product, int first, int count) {
  (product.in_lanes ? outer_product_in<Trunk> : outer_product_in<Single>)(product, first, count);
}

}  // namespace

extern const TileKernels kernels;
// Constants alone: nothing of this object may run on a CPU that lacks its instructions, not even to initialise it.
const TileKernels kernels = {kWidth,         kMaxBlock,     Trunk::kPerLane, pack,        dense_any,    normals,
                             scratch_floats, chain_forward, chain_backward,  mlp_forward, mlp_backward, outer_product};

}  // namespace llmdpd::LLMDPD_ISA
