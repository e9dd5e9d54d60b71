#include "reverse_diffusion.h"

#include "thread_pool.h"

namespace llmdpd {
namespace {

Chain prepare(const ChainCall& call, Gradients gradients, const TileKernels& kernels, Allocator& memory) {
  const int hidden = call.trunk.hidden;
  Chain chain{};
  chain.trunk = pack_trunk(call.trunk, gradients, kernels, memory);
  chain.first.input = pack_single(call.state_weight, false, kernels, memory);
  chain.action = pack_single(call.action_weight, false, kernels, memory);
  if (gradients == Gradients::wanted) {
    chain.first.input_transposed = pack_single(call.state_weight, true, kernels, memory);
    chain.action_transposed = pack_single(call.action_weight, true, kernels, memory);
  }
  chain.first.x = call.state;
  chain.first.x_stride = call.state_stride;
  chain.first.inputs = call.state_weight.inputs;
  chain.first.init = call.init_per_state ? call.init : copy_padded(call.init, hidden, kernels, memory);
  chain.first.init_stride = call.init_per_state ? hidden : 0;
  chain.first.init_share = 1;
  chain.time_rows = copy_rows_padded(call.time_rows, call.schedule.steps, hidden, kernels, memory);
  chain.action_dim = call.action_weight.inputs;
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

RowShape shape_of(const Chain& chain) { return {chain.rows, chain.samples, chain.steps, chain.action_dim}; }

void forward_wave(const Chain& chain, std::ptrdiff_t first, std::ptrdiff_t rows, const Tape* tape,
                  const TileKernels& kernels, int threads) {
  const std::size_t scratch_floats = kernels.scratch_floats(chain.trunk, chain.action_dim);
  const RowSplit parts(rows, kernels.max_rows, threads);
  parallel_for(parts.count(), threads, [&](int i) {
    thread_local Arena scratch;
    kernels.chain_forward(chain, first + parts[i].first, parts[i].rows, tape, first, scratch.reserve(scratch_floats));
  });
}

}  // namespace

void run_chain(const Chain& chain, const TileKernels& kernels, int threads) {
  if (chain.rows > 0) forward_wave(chain, 0, chain.rows, nullptr, kernels, threads);
}

std::size_t chain_tape_floats(const ChainCall& call, const TileKernels& kernels) {
  Trunk3 trunk{};
  trunk.hidden_padded = padded(call.trunk.hidden, kernels.width);
  trunk.outputs_padded = padded(call.trunk.outputs, kernels.width);
  const RowShape shape{call.states * call.samples, call.samples, call.schedule.steps, call.action_weight.inputs};
  return Waves(shape, trunk, kernels).tape_floats();
}

void chain_forward(const ChainCall& call, const TileKernels& kernels, int threads, float* actions, float* tape) {
  thread_local Arena arena;
  Chain chain;
  lay_out(arena, [&](Allocator& memory) { chain = prepare(call, Gradients::none, kernels, memory); });
  chain.actions = actions;
  if (!tape) return run_chain(chain, kernels, threads);
  const Waves waves(shape_of(chain), chain.trunk, kernels);
  for (std::ptrdiff_t wave = 0; wave < waves.count(); ++wave) {
    const Tape kept = waves.tape_in(wave, tape);
    forward_wave(chain, waves.first(wave), waves.rows(wave), &kept, kernels, threads);
  }
}

void chain_backward(const ChainCall& call, const TileKernels& kernels, int threads, const float* grad_actions,
                    const float* tape, const GradientTargets& targets) {
  thread_local Arena arena, gradient_arena, wave_arena;
  Chain chain;
  lay_out(arena, [&](Allocator& memory) {
    chain = prepare(call, Gradients::wanted, kernels, memory);
    // Where the chain is computed again its actions go here.
    chain.actions = memory.take(tape ? 0 : chain.rows * chain.action_dim);
  });
  const RowShape shape = shape_of(chain);
  // Declared out here: `add` works on what the second laying out made.
  std::unique_ptr<WeightGradients> sums;
  lay_out(gradient_arena, [&](Allocator& memory) {
    sums = std::make_unique<WeightGradients>(chain.trunk, chain.first, shape, targets, kernels, memory);
  });
  const Waves waves(shape, chain.trunk, kernels);
  const std::size_t scratch_floats = kernels.scratch_floats(chain.trunk, chain.action_dim);
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
      forward_wave(chain, first, rows, &kept, kernels, threads);
    }
    const RowSplit parts(rows, kernels.max_rows, threads);
    parallel_for(parts.count(), threads, [&](int i) {
      thread_local Arena scratch;
      kernels.chain_backward(chain, grad_actions, first + parts[i].first, parts[i].rows, kept, gradients, first,
                             scratch.reserve(scratch_floats));
    });
    sums->add(kept, gradients, first, rows, threads);
  }
  sums->finish();
}

}  // namespace llmdpd
