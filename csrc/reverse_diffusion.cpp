#include "reverse_diffusion.h"

#include "passes.h"

namespace llmdpd {
namespace {

Chain prepare(const ChainCall& call, Passes passes, const TileKernels& kernels, Allocator& memory,
              PackList& packs) {
  const int hidden = call.trunk.hidden;
  Chain chain{};
  chain.trunk = pack_trunk(call.trunk, passes, kernels, memory, &packs);
  chain.first.input = pack_single(call.W_s, false, kernels, memory, &packs);
  chain.action = pack_single(call.W_a, false, kernels, memory, &packs);
  if (passes.backward) {
    chain.first.input_transposed = pack_single(call.W_s, true, kernels, memory, &packs);
    chain.action_transposed = pack_single(call.W_a, true, kernels, memory, &packs);
  }
  chain.first.x = call.state;
  chain.first.x_stride = call.state_stride;
  chain.first.inputs = call.W_s.inputs;
  chain.first.init = call.u_z_per_state ? call.u_z : copy_padded(call.u_z, hidden, kernels, memory);
  chain.first.init_stride = call.u_z_per_state ? hidden : 0;
  chain.first.init_share = 1;
  chain.tau = copy_rows_padded(call.tau, call.schedule.steps, hidden, kernels, memory);
  chain.action_dim = call.W_a.inputs;
  chain.steps = call.schedule.steps;
  chain.table = call.schedule.table;
  chain.start = call.schedule.start;
  chain.clip = call.schedule.clip;
  chain.samples = call.samples;
  chain.rows = call.states * call.samples;
  chain.noise = call.noise.given;
  chain.keys = {call.noise.keys, call.noise.key_per_state, call.samples, chain.action_dim};
  return chain;
}

Pass<Chain> pass_of(const Chain& chain, const TileKernels& kernels, int threads) {
  const RowShape shape{chain.rows, chain.samples, chain.steps, chain.action_dim};
  return {chain, shape, kernels.chain_forward, kernels.chain_backward, kernels, threads};
}

}  // namespace

void run_chain(const Chain& chain, const TileKernels& kernels, int threads) {
  forward_pass(pass_of(chain, kernels, threads), nullptr);
}

std::size_t chain_tape_floats(const ChainCall& call, const TileKernels& kernels) {
  Trunk3 trunk{};
  trunk.hidden_padded = padded(call.trunk.hidden, kernels.width);
  trunk.outputs_padded = padded(call.trunk.outputs, kernels.width);
  const RowShape shape{call.states * call.samples, call.samples, call.schedule.steps, call.W_a.inputs};
  return RowBlocks(shape, trunk, kernels).tape_floats();
}

void chain_forward(const ChainCall& call, const TileKernels& kernels, int threads, float* actions, float* tape) {
  thread_local Arena arena;
  Chain chain;
  PackList packs;
  lay_out(arena, [&](Allocator& memory) { chain = prepare(call, {true, false}, kernels, memory, packs); });
  packs.run(kernels, threads);
  chain.actions = actions;
  forward_pass(pass_of(chain, kernels, threads), tape);
}

void chain_backward(const ChainCall& call, const TileKernels& kernels, int threads, const float* grad_actions,
                    const float* tape, const GradientTargets& targets) {
  thread_local Arena arena;
  Chain chain;
  PackList packs;
  lay_out(arena, [&](Allocator& memory) {
    chain = prepare(call, {!tape, true}, kernels, memory, packs);
    // Where the chain is computed again its actions go here.
    chain.actions = memory.take(tape ? 0 : chain.rows * chain.action_dim);
  });
  packs.run(kernels, threads);
  backward_pass(pass_of(chain, kernels, threads), grad_actions, tape, targets);
}

}  // namespace llmdpd
