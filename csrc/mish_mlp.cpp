#include "mish_mlp.h"

#include "thread_pool.h"

namespace llmdpd {
namespace {

Mlp prepare(const MlpCall& call, Gradients gradients, const TileKernels& kernels, Allocator& memory) {
  const int hidden = call.trunk.hidden;
  Mlp mlp{};
  mlp.trunk = pack_trunk(call.trunk, gradients, kernels, memory);
  mlp.first.input = pack_single(call.input_weight, false, kernels, memory);
  if (gradients == Gradients::wanted) mlp.first.input_transposed = pack_single(call.input_weight, true, kernels, memory);
  mlp.first.x = call.x;
  mlp.first.x_stride = call.x_stride;
  mlp.first.inputs = call.input_weight.inputs;
  mlp.first.init = call.init_per_row ? call.init : copy_padded(call.init, hidden, kernels, memory);
  mlp.first.init_stride = call.init_per_row ? hidden : 0;
  mlp.first.init_share = 1;
  mlp.rows = call.rows;
  return mlp;
}

RowShape shape_of(const MlpCall& call) { return {call.rows, 1, 1, 0}; }

void forward_wave(const Mlp& mlp, std::ptrdiff_t first, std::ptrdiff_t rows, const Tape* tape,
                  const TileKernels& kernels, int threads) {
  const std::size_t scratch_floats = kernels.scratch_floats(mlp.trunk, 0);
  const RowSplit parts(rows, kernels.max_rows, threads);
  parallel_for(parts.count(), threads, [&](int i) {
    thread_local Arena scratch;
    kernels.mlp_forward(mlp, first + parts[i].first, parts[i].rows, tape, first, scratch.reserve(scratch_floats));
  });
}

}  // namespace

void run_mlp(const Mlp& mlp, const TileKernels& kernels, int threads) {
  if (mlp.rows > 0) forward_wave(mlp, 0, mlp.rows, nullptr, kernels, threads);
}

std::size_t mlp_tape_floats(const MlpCall& call, const TileKernels& kernels) {
  Trunk3 trunk{};
  trunk.hidden_padded = padded(call.trunk.hidden, kernels.width);
  trunk.outputs_padded = padded(call.trunk.outputs, kernels.width);
  return Waves(shape_of(call), trunk, kernels).tape_floats();
}

void mlp_forward(const MlpCall& call, const TileKernels& kernels, int threads, float* out, float* tape) {
  thread_local Arena arena;
  Mlp mlp;
  lay_out(arena, [&](Allocator& memory) { mlp = prepare(call, Gradients::none, kernels, memory); });
  mlp.out = out;
  if (!tape) return run_mlp(mlp, kernels, threads);
  const Waves waves(shape_of(call), mlp.trunk, kernels);
  for (std::ptrdiff_t wave = 0; wave < waves.count(); ++wave) {
    const Tape kept = waves.tape_in(wave, tape);
    forward_wave(mlp, waves.first(wave), waves.rows(wave), &kept, kernels, threads);
  }
}

void mlp_backward(const MlpCall& call, const TileKernels& kernels, int threads, const float* grad_out, const float* tape,
                  const GradientTargets& targets) {
  thread_local Arena arena, gradient_arena, wave_arena;
  Mlp mlp;
  lay_out(arena, [&](Allocator& memory) {
    mlp = prepare(call, Gradients::wanted, kernels, memory);
    mlp.out = memory.take(tape ? 0 : mlp.rows * mlp.trunk.outputs);
  });
  const RowShape shape = shape_of(call);
  std::unique_ptr<WeightGradients> sums;
  lay_out(gradient_arena, [&](Allocator& memory) {
    sums = std::make_unique<WeightGradients>(mlp.trunk, mlp.first, shape, targets, kernels, memory);
  });
  const Waves waves(shape, mlp.trunk, kernels);
  const std::size_t scratch_floats = kernels.scratch_floats(mlp.trunk, 0);
  for (std::ptrdiff_t wave = 0; wave < waves.count(); ++wave) {
    const std::ptrdiff_t first = waves.first(wave), rows = waves.rows(wave);
    Tape kept{};
    TapeGradients gradients{};
    lay_out(wave_arena, [&](Allocator& memory) {
      gradients = waves.gradients(wave, memory);
      if (!tape) kept = waves.tape(wave, memory);
    });
    if (tape) {
      kept = waves.tape_in(wave, const_cast<float*>(tape));  // read only
    } else {
      forward_wave(mlp, first, rows, &kept, kernels, threads);
    }
    const RowSplit parts(rows, kernels.max_rows, threads);
    parallel_for(parts.count(), threads, [&](int i) {
      thread_local Arena scratch;
      kernels.mlp_backward(mlp, grad_out, first + parts[i].first, parts[i].rows, kept, gradients, first,
                           scratch.reserve(scratch_floats));
    });
    sums->add(kept, gradients, first, rows, threads);
  }
  sums->finish();
}

}  // namespace llmdpd
