#include "layers.h"

#include <algorithm>
#include <utility>

#include "thread_pool.h"

namespace llmdpd {
namespace {

constexpr std::ptrdiff_t kChunk = 48;  // rows of a linear layer's task

int chunks_of(std::ptrdiff_t rows) { return static_cast<int>((rows + kChunk - 1) / kChunk); }

RowStats* take_stats(std::ptrdiff_t rows, Allocator& memory) {
  static_assert(sizeof(RowStats) == 2 * sizeof(float), "kept among floats");
  return reinterpret_cast<RowStats*>(memory.take(2 * rows));
}

// A row of hidden numbers and a vector beside it, into which a head's padding may run.
std::ptrdiff_t stride_of(int width, const TileKernels& tile) { return padded(width, tile.width) + tile.width; }

// Calls body(task, scratch) for each task.
template <class Body>
void with_scratch(int tasks, std::size_t floats, const LayerTools& tools, const Body& body) {
  parallel_for(tasks, tools.threads, [&](int task) {
    thread_local Arena scratch;
    body(task, scratch.reserve(floats));
  });
}

// Where a call has one chunk of rows its threads share the outputs instead, and pack the weights of theirs themselves.
bool shares_outputs(const LinearInputs& in) { return in.rows <= kChunk && !in.norm.weight; }
constexpr int kSharedTiles = 4;

struct SharedOutputs {
  std::vector<std::pair<int, int>> tasks;  // layer and first output
  int width;                               // outputs of a task

  explicit SharedOutputs(const LayerTools& tools) : width(kSharedTiles * tools.tile.width) {}
  void add(int layer, int outputs) {
    for (int first = 0; first < outputs; first += width) tasks.emplace_back(layer, first);
  }
};

void forward_by_outputs(const LinearInputs& in, const LinearCall& call, const std::vector<float*>& out,
                        const LayerTools& tools) {
  for (std::ptrdiff_t r = 0; r < in.rows; ++r) {  // what the pass backward reads
    std::copy_n(in.x + r * in.inputs, in.inputs, call.input + r * call.stride);
    std::fill_n(call.input + r * call.stride + in.inputs, call.stride - in.inputs, 0.0f);
  }
  SharedOutputs shared(tools);
  for (std::size_t i = 0; i < in.layers.size(); ++i) shared.add(static_cast<int>(i), in.layers[i].weight.outputs);
  const std::size_t floats = shared.width * (in.inputs + in.rows + 1);
  with_scratch(static_cast<int>(shared.tasks.size()), floats, tools, [&](int task, float* scratch) {
    const auto [layer, first] = shared.tasks[task];
    const Linear& linear = in.layers[layer];
    const Matrix& weight = linear.weight;
    const int count = std::min(shared.width, weight.outputs - first), width = padded(count, tools.tile.width);
    float *bias = scratch + shared.width * in.inputs, *result = bias + shared.width;
    tools.tile.pack(weight.data + first * weight.stride, weight.stride, count, in.inputs, false, false, scratch);
    std::copy_n(linear.bias + first, count, bias);
    std::fill_n(bias + count, width - count, 0.0f);
    tools.tile.dense({scratch, nullptr, in.inputs, width}, in.x, in.inputs, bias, 0, result, width, in.rows);
    for (std::ptrdiff_t r = 0; r < in.rows; ++r) {
      std::copy_n(result + r * width, count, out[layer] + r * weight.outputs + first);
    }
  });
}

void backward_by_outputs(const LinearInputs& in, const std::vector<const float*>& d_out, float* d_x,
                         const LayerTools& tools) {
  SharedOutputs shared(tools);
  shared.add(0, in.inputs);  // x's numbers are what is computed here
  int most = 0;
  for (const Linear& layer : in.layers) most = std::max(most, layer.weight.outputs);
  const std::size_t floats = shared.width * (most + in.rows + 1);
  with_scratch(static_cast<int>(shared.tasks.size()), floats, tools, [&](int task, float* scratch) {
    const int first = shared.tasks[task].second, count = std::min(shared.width, in.inputs - first);
    const int width = padded(count, tools.tile.width);
    float *zeros = scratch + static_cast<std::ptrdiff_t>(shared.width) * most, *result = zeros + shared.width;
    std::fill_n(zeros, width, 0.0f);
    for (std::size_t i = 0; i < in.layers.size(); ++i) {
      const Matrix& weight = in.layers[i].weight;
      tools.tile.pack(weight.data + first, weight.stride, weight.outputs, count, true, false, scratch);
      tools.tile.dense({scratch, nullptr, weight.outputs, width}, d_out[i], weight.outputs, i == 0 ? zeros : result,
                       i == 0 ? 0 : width, result, width, in.rows);
    }
    for (std::ptrdiff_t r = 0; r < in.rows; ++r) std::copy_n(result + r * width, count, d_x + r * in.inputs + first);
  });
}

void run_grams(const std::vector<Gram>& grams, const LayerTools& tools) {
  std::vector<int> ends;
  for (const Gram& gram : grams) {
    const int tasks = (gram.outputs + tools.layers.gram_rows - 1) / tools.layers.gram_rows;
    ends.push_back((ends.empty() ? 0 : ends.back()) + tasks);
  }
  parallel_for(ends.empty() ? 0 : ends.back(), tools.threads, [&](int task) {
    const std::size_t which = std::upper_bound(ends.begin(), ends.end(), task) - ends.begin();
    const int first = task - (which == 0 ? 0 : ends[which - 1]);
    tools.layers.gram(grams[which], first * tools.layers.gram_rows);
  });
}

// The sum of `count` parts of a norm's gradients [parts, all], from `first` on: weight, then bias.
void sum_norm(const float* parts, std::ptrdiff_t count, std::ptrdiff_t all, std::ptrdiff_t stride, int width,
              const NormTarget& target) {
  for (int c = 0; c < width; ++c) {
    float weight = 0.0f, bias = 0.0f;
    for (std::ptrdiff_t part = 0; part < count; ++part) {
      weight += parts[part * all + c];
      bias += parts[part * all + stride + c];
    }
    target.weight[c] = weight;
    target.bias[c] = bias;
  }
}

// What is kept of a call, in the tape.
void keep_linear(LinearCall& call, bool norm, Allocator& memory) {
  call.input = memory.take(call.rows * call.stride);
  call.normed = norm ? memory.take(call.rows * call.stride) : call.input;
  call.stats = norm ? take_stats(call.rows, memory) : nullptr;
}

void keep_attention(AttentionCall& call, Allocator& memory) {
  const std::ptrdiff_t rows = static_cast<std::ptrdiff_t>(call.groups) * call.rows;
  for (float** part : {&call.input, &call.normed, &call.query, &call.found, &call.middle, &call.forward_normed}) {
    *part = memory.take(rows * call.stride);
  }
  for (float** part : {&call.wide, &call.active}) *part = memory.take(rows * call.wide_stride);
  call.weights = memory.take(rows * call.heads * call.steps_padded);
  call.stats = take_stats(rows, memory);
  call.forward_stats = take_stats(rows, memory);
}

LinearCall shape_of(const LinearInputs& in, const TileKernels& tile) {
  LinearCall call{};
  call.rows = in.rows, call.inputs = in.inputs, call.x = in.x;
  call.layers = static_cast<int>(in.layers.size());
  call.stride = stride_of(in.inputs, tile);
  return call;
}

std::vector<int> outputs_of(const LinearInputs& in) {
  std::vector<int> outputs;
  for (const Linear& layer : in.layers) outputs.push_back(layer.weight.outputs);
  return outputs;
}

AttentionCall shape_of(const AttentionInputs& in, const TileKernels& tile) {
  AttentionCall call{};
  call.groups = in.groups, call.rows = in.rows, call.steps = in.steps;
  call.width = in.width, call.heads = in.heads;
  call.steps_padded = padded(in.steps, tile.width);
  call.stride = stride_of(in.width, tile);
  call.wide_stride = stride_of(in.wide, tile);
  call.hidden = in.hidden, call.key = in.key, call.value = in.value, call.bias = in.bias;
  return call;
}

template <class Call, class Keep>
std::size_t floats_of(Call call, const Keep& keep) {
  Allocator memory(nullptr);
  keep(call, memory);
  return memory.used();
}

}  // namespace

PackedLayer pack_linear(const Linear& linear, const TileKernels& tile, Allocator& memory, PackList* later) {
  PackedLayer layer = pack_single(linear.weight, false, tile, memory, later);
  if (linear.bias) layer.bias = copy_padded(linear.bias, linear.weight.outputs, tile, memory);
  return layer;
}

LayerNorm pack_norm(const Norm& norm, int width, const TileKernels& tile, Allocator& memory) {
  if (!norm.weight) return {nullptr, nullptr};
  return {copy_padded(norm.weight, width, tile, memory), copy_padded(norm.bias, width, tile, memory)};
}

std::size_t linear_tape_floats(std::ptrdiff_t rows, int inputs, bool norm, const LayerTools& tools) {
  LinearCall call{};
  call.rows = rows;
  call.stride = stride_of(inputs, tools.tile);
  return floats_of(call, [norm](LinearCall& of, Allocator& memory) { keep_linear(of, norm, memory); });
}

void linear_forward(const LinearInputs& in, const std::vector<float*>& out, float* tape, const LayerTools& tools) {
  thread_local Arena arena;
  LinearCall call = shape_of(in, tools.tile);
  Allocator kept(tape);
  keep_linear(call, in.norm.weight != nullptr, kept);
  if (shares_outputs(in)) return forward_by_outputs(in, call, out, tools);
  std::vector<PackedLayer> packed(in.layers.size());
  const std::vector<int> outputs = outputs_of(in);
  PackList packs;
  lay_out(arena, [&](Allocator& memory) {
    for (std::size_t i = 0; i < packed.size(); ++i) packed[i] = pack_linear(in.layers[i], tools.tile, memory, &packs);
    call.norm = pack_norm(in.norm, in.inputs, tools.tile, memory);
  });
  packs.run(tools.tile, tools.threads);
  call.forward = packed.data(), call.outputs = outputs.data(), call.out = out.data();
  with_scratch(chunks_of(in.rows), tools.layers.linear_scratch(call, kChunk), tools, [&](int chunk, float* scratch) {
    const std::ptrdiff_t first = chunk * kChunk;
    tools.layers.linear_forward(call, first, std::min(kChunk, in.rows - first), scratch);
  });
}

void linear_backward(const LinearInputs& in, const std::vector<const float*>& d_out, float* tape, float* d_x,
                     NormTarget norm, const std::vector<LinearTarget>& targets, const LayerTools& tools) {
  thread_local Arena arena;
  const int chunks = chunks_of(in.rows);
  const bool shared = shares_outputs(in);
  LinearCall call = shape_of(in, tools.tile);
  std::vector<PackedLayer> packed(in.layers.size());
  const std::vector<int> outputs = outputs_of(in);
  LinearGradients gradients{d_out.data(), d_x, nullptr};
  PackList packs;
  lay_out(arena, [&](Allocator& memory) {
    for (std::size_t i = 0; d_x && !shared && i < packed.size(); ++i) {
      packed[i] = pack_single(in.layers[i].weight, true, tools.tile, memory, &packs);
    }
    call.norm = pack_norm(in.norm, in.inputs, tools.tile, memory);
    gradients.norm = memory.take(in.norm.weight ? chunks * 2 * call.stride : 0);
  });
  packs.run(tools.tile, tools.threads);
  call.backward = packed.data(), call.outputs = outputs.data();
  Allocator kept(tape);
  keep_linear(call, in.norm.weight != nullptr, kept);
  if (d_x && shared) {
    backward_by_outputs(in, d_out, d_x, tools);
  } else if (d_x) {
    with_scratch(chunks, tools.layers.linear_scratch(call, kChunk), tools, [&](int chunk, float* scratch) {
      const std::ptrdiff_t first = chunk * kChunk;
      tools.layers.linear_backward(call, gradients, first, std::min(kChunk, in.rows - first), chunk, scratch);
    });
  }
  std::vector<Gram> grams;
  for (std::size_t i = 0; i < targets.size(); ++i) {
    grams.push_back({d_out[i], outputs[i], call.normed, call.stride, in.rows, outputs[i], in.inputs, targets[i].weight,
                     in.inputs, targets[i].bias});
  }
  run_grams(grams, tools);
  if (in.norm.weight) sum_norm(gradients.norm, chunks, 2 * call.stride, call.stride, in.inputs, norm);
}

std::size_t attention_tape_floats(const AttentionInputs& in, const LayerTools& tools) {
  return floats_of(shape_of(in, tools.tile), [](AttentionCall& call, Allocator& memory) { keep_attention(call, memory); });
}

void attention_forward(const AttentionInputs& in, float* out, float* tape, const LayerTools& tools) {
  thread_local Arena arena;
  AttentionCall call = shape_of(in, tools.tile);
  call.out = out;
  PackList packs;
  lay_out(arena, [&](Allocator& memory) {
    call.layer = {pack_norm(in.query_norm, in.width, tools.tile, memory),
                  pack_norm(in.forward_norm, in.width, tools.tile, memory),
                  pack_linear(in.query, tools.tile, memory, &packs),
                  pack_linear(in.out, tools.tile, memory, &packs),
                  pack_linear(in.widen, tools.tile, memory, &packs),
                  pack_linear(in.narrow, tools.tile, memory, &packs)};
  });
  packs.run(tools.tile, tools.threads);
  Allocator kept(tape);
  keep_attention(call, kept);
  with_scratch(in.groups, tools.layers.attention_scratch(call), tools,
               [&](int group, float* scratch) { tools.layers.attention_forward(call, group, scratch); });
}

void attention_backward(const AttentionInputs& in, const float* d_out, float* tape, const AttentionTargets& targets,
                        const LayerTools& tools) {
  thread_local Arena arena;
  AttentionCall call = shape_of(in, tools.tile);
  AttentionGradients gradients{};
  gradients.out = d_out;
  gradients.hidden = targets.hidden, gradients.key = targets.key, gradients.value = targets.value;
  const std::ptrdiff_t rows = static_cast<std::ptrdiff_t>(in.groups) * in.rows;
  PackList packs;
  lay_out(arena, [&](Allocator& memory) {
    call.layer.query_norm = pack_norm(in.query_norm, in.width, tools.tile, memory);
    call.layer.forward_norm = pack_norm(in.forward_norm, in.width, tools.tile, memory);
    call.query_transposed = pack_single(in.query.weight, true, tools.tile, memory, &packs);
    call.out_transposed = pack_single(in.out.weight, true, tools.tile, memory, &packs);
    call.widen_transposed = pack_single(in.widen.weight, true, tools.tile, memory, &packs);
    call.narrow_transposed = pack_single(in.narrow.weight, true, tools.tile, memory, &packs);
    gradients.d_out = memory.take(rows * call.stride);
    gradients.d_middle = memory.take(rows * call.stride);
    gradients.d_query = memory.take(rows * call.stride);
    gradients.d_wide = memory.take(rows * call.wide_stride);
    gradients.norms = memory.take(in.groups * 4 * call.stride);
  });
  packs.run(tools.tile, tools.threads);
  Allocator kept(tape);
  keep_attention(call, kept);
  with_scratch(in.groups, tools.layers.attention_scratch(call), tools, [&](int group, float* scratch) {
    tools.layers.attention_backward(call, gradients, group, scratch);
  });
  const auto gram = [&](const float* left, std::ptrdiff_t left_stride, const float* right, std::ptrdiff_t right_stride,
                        const Linear& of, const LinearTarget& to) {
    const int outputs = of.weight.outputs, inputs = of.weight.inputs;
    return Gram{left, left_stride, right, right_stride, rows, outputs, inputs, to.weight, inputs, to.bias};
  };
  run_grams({gram(gradients.d_query, call.stride, call.normed, call.stride, in.query, targets.query),
             gram(gradients.d_middle, call.stride, call.found, call.stride, in.out, targets.out),
             gram(gradients.d_wide, call.wide_stride, call.forward_normed, call.stride, in.widen, targets.widen),
             gram(gradients.d_out, call.stride, call.active, call.wide_stride, in.narrow, targets.narrow)},
            tools);
  sum_norm(gradients.norms, in.groups, 4 * call.stride, call.stride, in.width, targets.query_norm);
  sum_norm(gradients.norms + 2 * call.stride, in.groups, 4 * call.stride, call.stride, in.width, targets.forward_norm);
}

std::size_t retrieval_tape_floats(const RetrievalCall& call, const LayerTools& tools) {
  return static_cast<std::size_t>(call.groups) * call.rows * call.heads * padded(call.steps, tools.tile.width);
}

void retrieval_forward(RetrievalCall call, float* tape, const LayerTools& tools) {
  call.steps_padded = padded(call.steps, tools.tile.width);
  call.weights = tape;
  with_scratch(call.groups, tools.layers.retrieval_scratch(call), tools,
               [&](int group, float* scratch) { tools.layers.retrieval_forward(call, group, scratch); });
}

void retrieval_backward(RetrievalCall call, const float* d_out, float* tape, float* d_query, float* d_key,
                        float* d_similarity, const LayerTools& tools) {
  thread_local Arena arena;
  call.steps_padded = padded(call.steps, tools.tile.width);
  call.weights = tape;
  const std::ptrdiff_t weights = static_cast<std::ptrdiff_t>(call.heads) * call.compared;
  float* parts = arena.reserve(call.groups * weights);
  const RetrievalGradients gradients{d_out, d_query, d_key, parts};
  with_scratch(call.groups, tools.layers.retrieval_scratch(call), tools, [&](int group, float* scratch) {
    tools.layers.retrieval_backward(call, gradients, group, scratch);
  });
  for (std::ptrdiff_t i = 0; call.there && i < weights; ++i) {
    float sum = 0.0f;
    for (int group = 0; group < call.groups; ++group) sum += parts[group * weights + i];
    d_similarity[i] = sum;
  }
}

}  // namespace llmdpd
