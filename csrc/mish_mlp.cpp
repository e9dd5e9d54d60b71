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

void mlps_forward(const std::vector<MlpCall>& calls, const TileKernels& kernels, int threads, float* const* outs,
                  float* const* tapes) {
  thread_local Arena arena;
  std::vector<Mlp> mlps(calls.size());
  PackList packs;
  lay_out(arena, [&](Allocator& memory) {
    for (std::size_t i = 0; i < calls.size(); ++i) mlps[i] = prepare(calls[i], {true, false}, kernels, memory, packs);
  });
  packs.run(kernels, threads);
  std::vector<Pass<Mlp>> passes;
  for (std::size_t i = 0; i < calls.size(); ++i) {
    mlps[i].out = outs[i];
    passes.push_back(pass_of(mlps[i], kernels, threads));
  }
  forward_passes(passes.data(), static_cast<int>(passes.size()), tapes);
}

void mlps_backward(const std::vector<MlpCall>& calls, const TileKernels& kernels, int threads,
                   const float* const* grads, const float* const* tapes, const GradientTargets* targets) {
  thread_local Arena arena;
  std::vector<Mlp> mlps(calls.size());
  PackList packs;
  lay_out(arena, [&](Allocator& memory) {
    for (std::size_t i = 0; i < calls.size(); ++i) {
      mlps[i] = prepare(calls[i], {!tapes[0], true}, kernels, memory, packs);
      mlps[i].out = memory.take(tapes[0] ? 0 : mlps[i].rows * mlps[i].trunk.outputs);
    }
  });
  packs.run(kernels, threads);
  std::vector<Pass<Mlp>> passes;
  for (const Mlp& mlp : mlps) passes.push_back(pass_of(mlp, kernels, threads));
  backward_passes(passes.data(), static_cast<int>(passes.size()), grads, tapes, targets);
}

void mlp_forward(const MlpCall& call, const TileKernels& kernels, int threads, float* out, float* tape) {
  mlps_forward({call}, kernels, threads, &out, &tape);
}

void mlp_backward(const MlpCall& call, const TileKernels& kernels, int threads, const float* grad_out,
                  const float* tape, const GradientTargets& targets) {
  mlps_backward({call}, kernels, threads, &grad_out, &tape, &targets);
}

}  // namespace llmdpd
