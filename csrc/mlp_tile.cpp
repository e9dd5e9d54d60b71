#include "mlp_tile.h"

#include "philox.h"
#include "simd.h"

// Compiled once for each instruction set, LLMDPD_ISA naming the namespace. See simd.h for what must not be used here.
namespace llmdpd::LLMDPD_ISA {
namespace {

constexpr int kMaxPanels = 8;

// Few rows leave few accumulators, so they take more panels at once: enough independent sums to hide the latency of a
// multiply-add, few enough to stay in registers.
constexpr int panels_at_once(int rows) { return rows == 1 ? kMaxPanels : rows <= 3 ? 4 : 2; }

struct Rows {
  const float* x;
  std::ptrdiff_t x_stride;
  const float* init;
  std::ptrdiff_t init_stride;
  float* out;
  std::ptrdiff_t out_stride;
};

// out = init + x W for `rows` rows and `panels` vectors of outputs. Each output is one sum in the order of k, whatever
// the block's shape: that is what makes a row's result independent of its neighbours.
template <int rows, int panels, bool activate>
inline __attribute__((always_inline)) void block(const float* weights, int inputs, const Rows& io,
                                                 std::ptrdiff_t column) {
  Vec sum[rows][panels];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < panels; ++p) sum[r][p] = load(io.init + r * io.init_stride + column + p * kWidth);
  }
  const std::ptrdiff_t panel_floats = static_cast<std::ptrdiff_t>(inputs) * kWidth;
  for (int k = 0; k < inputs; ++k) {
    Vec w[panels];
#pragma GCC unroll 8
    for (int p = 0; p < panels; ++p) w[p] = load(weights + p * panel_floats + k * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const Vec x = broadcast(io.x[r * io.x_stride + k]);
#pragma GCC unroll 8
      for (int p = 0; p < panels; ++p) sum[r][p] = fma(x, w[p], sum[r][p]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < panels; ++p) {
      store(io.out + r * io.out_stride + column + p * kWidth, activate ? mish(sum[r][p]) : sum[r][p]);
    }
  }
}

template <int rows, bool activate>
void dense_rows(const PackedLayer& layer, const Rows& io) {
  constexpr int group = panels_at_once(rows);
  const int panels = padded(layer.outputs, kWidth) / kWidth;
  const std::ptrdiff_t panel_floats = static_cast<std::ptrdiff_t>(layer.inputs) * kWidth;
  int p = 0;
  for (; p + group <= panels; p += group) {
    block<rows, group, activate>(layer.panels + p * panel_floats, layer.inputs, io, p * kWidth);
  }
  for (; p < panels; ++p) {
    block<rows, 1, activate>(layer.panels + p * panel_floats, layer.inputs, io, p * kWidth);
  }
}

template <bool activate, int candidate = kMaxBlock>
void dense_block(const PackedLayer& layer, const Rows& io, int rows) {
  if (rows == candidate) {
    dense_rows<candidate, activate>(layer, io);
  } else if constexpr (candidate > 1) {
    dense_block<activate, candidate - 1>(layer, io, rows);
  }
}

void dense(const PackedLayer& layer, const float* x, std::ptrdiff_t x_stride, const float* init,
           std::ptrdiff_t init_stride, float* out, std::ptrdiff_t out_stride, int rows) {
  for (int first = 0; first < rows; first += kMaxBlock) {
    const int count = rows - first < kMaxBlock ? rows - first : kMaxBlock;
    dense_block<false>(layer,
                       {x + first * x_stride, x_stride, init + first * init_stride, init_stride,
                        out + first * out_stride, out_stride},
                       count);
  }
}

void pack(const float* weights, std::ptrdiff_t stride, int outputs, int inputs, float* panels) {
  for (int first = 0; first < outputs; first += kWidth) {
    const float* from = weights + first * stride;
    float* to = panels + static_cast<std::ptrdiff_t>(first) * inputs;
    const int count = outputs - first < kWidth ? outputs - first : kWidth;
    int k = 0;
    for (; count == kWidth && k + kWidth <= inputs; k += kWidth) {
      Vec square[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) square[i] = load(from + i * stride + k);
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) store(to + (k + i) * kWidth, square[i]);
    }
    for (; k < inputs; ++k) {
      for (int i = 0; i < kWidth; ++i) to[k * kWidth + i] = i < count ? from[i * stride + k] : 0.0f;
    }
  }
}

// A tile's memory: all of it lives in the first-level cache through the whole chain.
struct Scratch {
  std::ptrdiff_t stride;  // of a hidden row; one vector more than it needs, so that rows don't share cache sets
  float *context, *hidden, *other, *epsilon, *x0, *noise;
  std::ptrdiff_t floats;

  Scratch(const ReverseProblem& problem, float* base) : stride(problem.hidden_padded + kWidth) {
    const std::ptrdiff_t hidden_floats = kMaxBlock * stride;
    context = base;
    hidden = context + hidden_floats;
    other = hidden + hidden_floats;
    epsilon = other + hidden_floats;
    x0 = epsilon + static_cast<std::ptrdiff_t>(kMaxBlock) * problem.action_padded;
    noise = x0 + static_cast<std::ptrdiff_t>(kMaxBlock) * problem.action_dim;
    floats = noise + problem.action_dim - base;
  }
};

std::size_t scratch_floats(const ReverseProblem& problem) {
  float origin[1];
  return static_cast<std::size_t>(Scratch(problem, origin).floats);
}

// u = W_s s + W_z z + b1, once for each state of the tile.
void prepare_context(const ReverseProblem& problem, std::ptrdiff_t first_state, int states, const Scratch& scratch) {
  const float* init = problem.context_base;
  std::ptrdiff_t init_stride = 0;
  if (problem.prompts) {
    dense_block<false>(problem.prompt_layer,
                       {problem.prompts + first_state * problem.prompt_dim, problem.prompt_dim, init, init_stride,
                        scratch.context, scratch.stride},
                       states);
    init = scratch.context;
    init_stride = scratch.stride;
  }
  dense_block<false>(problem.state_layer,
                     {problem.states + first_state * problem.state_dim, problem.state_dim, init, init_stride,
                      scratch.context, scratch.stride},
                     states);
}

// The normals of one row and draw: given, or drawn into `buffer`.
const float* draw_noise(const ReverseProblem& problem, std::ptrdiff_t row, int draw, float* buffer) {
  if (problem.noise) return problem.noise + (draw * problem.rows + row) * problem.action_dim;
  const std::ptrdiff_t state = row / problem.samples;
  const bool own_key = problem.key_per_state;
  philox_normal(problem.keys[own_key ? state : 0],
                static_cast<std::uint32_t>(own_key ? row % problem.samples : row), static_cast<std::uint32_t>(draw),
                problem.action_dim, buffer);
  return buffer;
}

// ε of the tile's rows at step k, into scratch.epsilon.
void predict_noise(const ReverseProblem& problem, int k, std::ptrdiff_t first_row, int rows, const Scratch& scratch) {
  const std::ptrdiff_t stride = scratch.stride;
  const std::ptrdiff_t first_state = first_row / problem.samples;
  const float* time_row = problem.time_rows + static_cast<std::ptrdiff_t>(k) * problem.hidden_padded;
  for (int r = 0; r < rows; ++r) {
    const float* context = scratch.context + ((first_row + r) / problem.samples - first_state) * stride;
    for (int h = 0; h < problem.hidden_padded; h += kWidth) {
      store(scratch.hidden + r * stride + h, load(context + h) + load(time_row + h));
    }
  }
  const float* actions = problem.actions + first_row * problem.action_dim;
  dense_block<true>(problem.action_layer,
                    {actions, problem.action_dim, scratch.hidden, stride, scratch.hidden, stride}, rows);
  dense_block<true>(problem.second, {scratch.hidden, stride, problem.second.bias, 0, scratch.other, stride}, rows);
  dense_block<true>(problem.third, {scratch.other, stride, problem.third.bias, 0, scratch.hidden, stride}, rows);
  dense_block<false>(problem.output,
                     {scratch.hidden, stride, problem.output.bias, 0, scratch.epsilon, problem.action_padded}, rows);
}

// x0 = clip(p a + e ε); a = A a + B x0 + C x0_previous + S ξ, in place.
void update_actions(const ReverseProblem& problem, int k, std::ptrdiff_t first_row, int rows, const Scratch& scratch) {
  const StepCoefficients c = problem.table[k];
  const bool noisy = c.S != 0.0f;
  for (int r = 0; r < rows; ++r) {
    float* a = problem.actions + (first_row + r) * problem.action_dim;
    float* x0 = scratch.x0 + r * problem.action_dim;
    const float* epsilon = scratch.epsilon + r * problem.action_padded;
    const float* xi = noisy ? draw_noise(problem, first_row + r, k + 1, scratch.noise) : nullptr;
    for (int i = 0; i < problem.action_dim; ++i) {
      float predicted = c.p * a[i] + c.e * epsilon[i];
      // Written so that a NaN passes.
      predicted = predicted > problem.clip ? problem.clip : predicted < -problem.clip ? -problem.clip : predicted;
      a[i] = c.A * a[i] + c.B * predicted + c.C * x0[i];
      if (xi) a[i] += c.S * xi[i];
      x0[i] = predicted;
    }
  }
}

void run_tile(const ReverseProblem& problem, std::ptrdiff_t first_row, int rows, float* memory) {
  const Scratch scratch(problem, memory);
  const std::ptrdiff_t first_state = first_row / problem.samples;
  const std::ptrdiff_t last_state = (first_row + rows - 1) / problem.samples;
  prepare_context(problem, first_state, static_cast<int>(last_state - first_state + 1), scratch);
  float* actions = problem.actions + first_row * problem.action_dim;
  for (int r = 0; r < rows; ++r) {
    const float* start = draw_noise(problem, first_row + r, 0, scratch.noise);
    for (int i = 0; i < problem.action_dim; ++i) {
      actions[r * problem.action_dim + i] = problem.start * start[i];
      scratch.x0[r * problem.action_dim + i] = 0.0f;
    }
  }
  for (int k = 0; k < problem.steps; ++k) {
    predict_noise(problem, k, first_row, rows, scratch);
    update_actions(problem, k, first_row, rows, scratch);
  }
  for (int i = 0; i < rows * problem.action_dim; ++i) {
    const float a = actions[i];
    actions[i] = a > problem.clip ? problem.clip : a < -problem.clip ? -problem.clip : a;
  }
}

}  // namespace

extern const TileKernels kernels;
const TileKernels kernels = {kWidth, kMaxBlock, pack, dense, scratch_floats, run_tile};

}  // namespace llmdpd::LLMDPD_ISA
