#include "reverse_diffusion.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "thread_pool.h"

namespace llmdpd {
namespace {

constexpr std::size_t kAlignment = 64;

// A thread's reusable memory. Kept between calls: fresh pages for half a megabyte of panels would cost more than the
// packing itself.
class Arena {
 public:
  float* reserve(std::size_t floats) {
    if (floats > capacity_) {
      memory_.reset();
      capacity_ = 0;
      memory_.reset(static_cast<float*>(::operator new(floats * sizeof(float), std::align_val_t(kAlignment))));
      capacity_ = floats;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t(kAlignment)); }
  };
  std::unique_ptr<float, Free> memory_;
  std::size_t capacity_ = 0;
};

// Hands out parts of one block. With a null base it only counts.
class Allocator {
 public:
  explicit Allocator(float* base) : base_(base) {}
  float* take(std::size_t floats) {
    float* part = base_ ? base_ + used_ : nullptr;
    used_ += (floats + 15) / 16 * 16;  // keeps every part aligned to 64 bytes
    return part;
  }
  std::size_t used() const { return used_; }

 private:
  float* base_;
  std::size_t used_ = 0;
};

struct CallMemory {
  float *state, *prompt, *action, *time, *hidden[2], *output;  // panels
  float *bias[4], *context_base, *time_rows, *zeros;
  std::size_t floats;

  CallMemory(const Net& net, const Chain& chain, int width, float* base) {
    Allocator memory(base);
    const std::size_t hidden_padded = padded(net.hidden_dim, width), action_padded = padded(net.action_dim, width);
    state = memory.take(hidden_padded * net.state_dim);
    prompt = memory.take(hidden_padded * net.prompt_dim);
    action = memory.take(hidden_padded * net.action_dim);
    time = memory.take(hidden_padded * net.time_dim);
    for (float*& panels : hidden) panels = memory.take(hidden_padded * net.hidden_dim);
    output = memory.take(action_padded * net.hidden_dim);
    for (int layer = 0; layer < 4; ++layer) bias[layer] = memory.take(layer < 3 ? hidden_padded : action_padded);
    context_base = memory.take(hidden_padded);
    time_rows = memory.take(hidden_padded * chain.steps);
    zeros = memory.take(hidden_padded);
    floats = memory.used();
  }
};

PackedLayer pack(const TileKernels& kernels, const float* weights, std::ptrdiff_t stride, int outputs, int inputs,
                 float* panels, const float* bias) {
  kernels.pack(weights, stride, outputs, inputs, panels);
  return {panels, bias, inputs, outputs};
}

void copy_padded(const float* from, int count, int width, float* to) {
  std::memcpy(to, from, sizeof(float) * count);
  std::fill(to + count, to + padded(count, width), 0.0f);
}

void pack_net(const Net& net, const TileKernels& kernels, const CallMemory& memory, ReverseProblem& problem) {
  const int hidden = net.hidden_dim;
  for (int layer = 0; layer < 4; ++layer) {
    copy_padded(net.bias[layer], layer < 3 ? hidden : net.action_dim, kernels.width, memory.bias[layer]);
  }
  const std::ptrdiff_t stride = net.action_dim + net.time_dim + net.state_dim + net.prompt_dim;
  const float* part = net.weight[0];
  problem.action_layer = pack(kernels, part, stride, hidden, net.action_dim, memory.action, nullptr);
  part += net.action_dim + net.time_dim;
  problem.state_layer = pack(kernels, part, stride, hidden, net.state_dim, memory.state, nullptr);
  part += net.state_dim;
  problem.prompt_layer = pack(kernels, part, stride, hidden, net.prompt_dim, memory.prompt, nullptr);
  problem.second = pack(kernels, net.weight[1], hidden, hidden, hidden, memory.hidden[0], memory.bias[1]);
  problem.third = pack(kernels, net.weight[2], hidden, hidden, hidden, memory.hidden[1], memory.bias[2]);
  problem.output = pack(kernels, net.weight[3], hidden, net.action_dim, hidden, memory.output, memory.bias[3]);
}

// W_t times the time embedding, [steps, padded hidden].
void compute_time_rows(const Net& net, const Chain& chain, const TileKernels& kernels, const CallMemory& memory) {
  const std::ptrdiff_t stride = net.action_dim + net.time_dim + net.state_dim + net.prompt_dim;
  const PackedLayer layer = pack(kernels, net.weight[0] + net.action_dim, stride, net.hidden_dim, net.time_dim,
                                 memory.time, nullptr);
  const int hidden_padded = padded(net.hidden_dim, kernels.width);
  std::fill(memory.zeros, memory.zeros + hidden_padded, 0.0f);
  kernels.dense(layer, chain.time_embedding, net.time_dim, memory.zeros, 0, memory.time_rows, hidden_padded,
                chain.steps);
}

// Few enough tiles to fill their rows, enough to give every thread one of at least six rows, and as many for each.
int tile_count(std::ptrdiff_t rows, int max_rows, int threads) {
  constexpr std::ptrdiff_t kWorthwhileRows = 6;
  std::ptrdiff_t tiles = (rows + max_rows - 1) / max_rows;
  tiles = std::max(tiles, std::min<std::ptrdiff_t>(threads, rows / kWorthwhileRows));
  if (tiles > threads) tiles = (tiles + threads - 1) / threads * threads;
  return static_cast<int>(std::min(tiles, rows));
}

}  // namespace

void reverse_diffusion(const Net& net, const Chain& chain, const Batch& batch, const TileKernels& kernels, int threads,
                       float* actions) {
  const std::ptrdiff_t rows = batch.states * batch.samples;
  if (rows == 0) return;

  thread_local Arena call_arena;
  const int width = kernels.width;
  const CallMemory memory(net, chain, width, call_arena.reserve(CallMemory(net, chain, width, nullptr).floats));

  ReverseProblem problem{};
  problem.hidden_padded = padded(net.hidden_dim, width);
  problem.action_dim = net.action_dim;
  problem.action_padded = padded(net.action_dim, width);
  problem.state_dim = net.state_dim;
  problem.prompt_dim = net.prompt_dim;
  problem.steps = chain.steps;
  problem.samples = batch.samples;
  problem.start = chain.start;
  problem.clip = chain.clip;
  problem.table = chain.table;
  problem.states = batch.state;
  problem.noise = batch.noise;
  problem.keys = batch.keys;
  problem.key_per_state = batch.key_per_state;
  problem.rows = rows;
  problem.actions = actions;
  pack_net(net, kernels, memory, problem);
  compute_time_rows(net, chain, kernels, memory);
  problem.time_rows = memory.time_rows;
  problem.context_base = memory.bias[0];
  if (batch.prompt_per_state) {
    problem.prompts = batch.prompt;
  } else {
    kernels.dense(problem.prompt_layer, batch.prompt, net.prompt_dim, memory.bias[0], 0, memory.context_base, 0, 1);
    problem.context_base = memory.context_base;
  }

  const std::size_t scratch_floats = kernels.scratch_floats(problem);
  const int tiles = tile_count(rows, kernels.max_rows, threads);
  parallel_for(tiles, threads, [&](int tile) {
    thread_local Arena scratch;
    const std::ptrdiff_t first = rows * tile / tiles;
    const std::ptrdiff_t last = rows * (tile + 1) / tiles;
    kernels.run_tile(problem, first, static_cast<int>(last - first), scratch.reserve(scratch_floats));
  });
}

}  // namespace llmdpd
