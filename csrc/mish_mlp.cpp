#include "mish_mlp.h"

#include "passes.h"

namespace llmdpd {
namespace {

Mlp prepare(const MlpCall& call, Passes passes, const TileKernels& kernels, Allocator& memory,
            PackList& packs) {
  const int hidden = call.trunk.hidden;
  Mlp mlp{};
  mlp.trunk = pack_trunk(call.trunk, passes, kernels, memory, &packs);
  mlp.first.input = pack_single(call.input_weight, false, kernels, memory, &packs);
  if (passes.backward) mlp.first.input_transposed = pack_single(call.input_weight, true, kernels, memory, &packs);
  mlp.first.x = call.x;
  mlp.first.x_stride = call.x_stride;
  mlp.first.inputs = call.input_weight.inputs;
  mlp.first.init = call.init_per_row ? call.init : copy_padded(call.init, hidden, kernels, memory);
  mlp.first.init_stride = call.init_per_row ? hidden : 0;
  mlp.first.init_share = call.init_share;
  mlp.rows = call.rows;
  return mlp;
}

RowShape shape_of(std::ptrdiff_t rows) { return {rows, 1, 1, 0}; }

Pass<Mlp> pass_of(const Mlp& mlp, const TileKernels& kernels, int threads) {
  return {mlp, shape_of(mlp.rows), kernels.mlp_forward, kernels.mlp_backward, kernels, threads};
}

}  // namespace

void run_mlp(const Mlp& mlp, const TileKernels& kernels, int threads) {
  forward_pass(pass_of(mlp, kernels, threads), nullptr);
}

std::size_t mlp_tape_floats(const MlpCall& call, const TileKernels& kernels) {
  Trunk3 trunk{};
  trunk.hidden_padded = padded(call.trunk.hidden, kernels.width);
  trunk.outputs_padded = padded(call.trunk.outputs, kernels.width);
  return RowBlocks(shape_of(call.rows), trunk, kernels).tape_floats();
}

void mlp_forward(const MlpCall& call, const TileKernels& kernels, int threads, float* out, float* tape) {
  thread_local Arena arena;
  Mlp mlp;
  PackList packs;
  lay_out(arena, [&](Allocator& memory) { mlp = prepare(call, {true, false}, kernels, memory, packs); });
  packs.run(kernels, threads);
  mlp.out = out;
  forward_pass(pass_of(mlp, kernels, threads), tape);
}

void mlp_backward(const MlpCall& call, const TileKernels& kernels, int threads, const float* grad_out,
                  const float* tape, const GradientTargets& targets) {
  thread_local Arena arena;
  Mlp mlp;
  PackList packs;
  lay_out(arena, [&](Allocator& memory) {
    mlp = prepare(call, {!tape, true}, kernels, memory, packs);
    mlp.out = memory.take(tape ? 0 : mlp.rows * mlp.trunk.outputs);
  });
  packs.run(kernels, threads);
  backward_pass(pass_of(mlp, kernels, threads), grad_out, tape, targets);
}

}  // namespace llmdpd
