#include "context.h"

#include <algorithm>
#include <cmath>

#include "row_blocks.h"
#include "thread_pool.h"

namespace llmdpd {
namespace {

constexpr double kTwoPi = 6.283185307179586476925;

// A head's weights [outputs, inputs], times `scale`, whatever its numbers' strides, with a bias of zeros.
PackedLayer pack_head(const float* from, std::ptrdiff_t output_stride, std::ptrdiff_t input_stride, int outputs,
                      int inputs, float scale, const TileKernels& kernels, Allocator& memory) {
  std::vector<float> dense(memory.counting() ? 0 : static_cast<std::size_t>(outputs) * inputs);
  for (std::size_t i = 0; i < dense.size(); ++i) {
    const std::ptrdiff_t output = static_cast<std::ptrdiff_t>(i) / inputs, input = static_cast<std::ptrdiff_t>(i) % inputs;
    dense[i] = scale * from[output * output_stride + input * input_stride];
  }
  PackedLayer layer = pack_single({dense.data(), inputs, outputs, inputs}, false, kernels, memory);
  const int width = padded(outputs, kernels.width);
  float* bias = memory.take(width);
  if (!memory.counting()) std::fill(bias, bias + width, 0.0f);
  layer.bias = bias;
  return layer;
}

// [steps_padded], -inf beyond the steps.
const float* pad_bias(const float* from, int steps, int steps_padded, Allocator& memory) {
  float* to = memory.take(steps_padded);
  if (!memory.counting()) std::fill(std::copy_n(from, steps, to), to + steps_padded, -INFINITY);
  return to;
}

// [count, steps_padded] of [steps, count].
const float* transpose_padded(const float* from, int steps, int count, int steps_padded, Allocator& memory) {
  float* to = memory.take(static_cast<std::size_t>(count) * steps_padded);
  for (int i = 0; !memory.counting() && i < count; ++i) {
    float* row = to + static_cast<std::ptrdiff_t>(i) * steps_padded;
    for (int t = 0; t < steps; ++t) row[t] = from[static_cast<std::ptrdiff_t>(t) * count + i];
    std::fill(row + steps, row + steps_padded, 0.0f);
  }
  return to;
}

}  // namespace

Context::Context(const ContextSizes& sizes, ContextFeatures features, const ContextWeights& weights,
                 const TileKernels& tile_kernels, const LayerKernels& layer_kernels)
    : kernels(tile_kernels), layers(layer_kernels), features_(std::move(features)), attention_(weights.attention.size()) {
  net_.state_dim = sizes.state_dim;
  net_.points = {features_.point_columns.data(), features_.point_ends.data(),
                 static_cast<int>(features_.point_ends.size())};
  net_.own = {features_.own.data(), static_cast<int>(features_.own.size())};
  net_.geometry = {features_.geometry.data(), static_cast<int>(features_.geometry.size())};
  net_.embedding_dim = 2 * static_cast<int>(features_.periods.size());
  net_.width = sizes.width;
  net_.heads = sizes.heads;
  net_.layers = sizes.layers;
  net_.action_dim = sizes.action_dim;
  net_.lookaheads = sizes.lookaheads;
  net_.output_dim = net_.own.count + net_.embedding_dim;
  if (sizes.width == 0) return;
  if (weights.norm.weight) net_.output_dim += sizes.width;
  if (weights.waypoint_query.weight.data) {
    net_.output_dim += sizes.heads * (net_.found_dim() + sizes.lookaheads * net_.geometry.count);
  }
  lay_out(memory_, [&](Allocator& memory) {
    net_.query = pack_linear(weights.query, kernels, memory);
    for (std::size_t i = 0; i < attention_.size(); ++i) {
      const ContextWeights::Attention& from = weights.attention[i];
      attention_[i] = {pack_norm(from.query_norm, sizes.width, kernels, memory),
                       pack_norm(from.forward_norm, sizes.width, kernels, memory),
                       pack_linear(from.query, kernels, memory),
                       pack_linear(from.out, kernels, memory),
                       pack_linear(from.widen, kernels, memory),
                       pack_linear(from.narrow, kernels, memory)};
    }
    net_.norm = pack_norm(weights.norm, sizes.width, kernels, memory);
    if (weights.waypoint_query.weight.data) net_.waypoint_query = pack_linear(weights.waypoint_query, kernels, memory);
    if (weights.similarity) {
      float* similarity = memory.take(static_cast<std::size_t>(sizes.heads) * net_.compared());
      if (!memory.counting()) std::copy_n(weights.similarity, sizes.heads * net_.compared(), similarity);
      net_.similarity = similarity;
    }
  });
  net_.attention = attention_.data();
}

Prompts::Prompts(std::shared_ptr<const Context> context, const PromptTensors& tensors)
    : context_(std::move(context)),
      count_(tensors.prompts),
      prompt_dim_(tensors.prompt_dim),
      steps_padded_(padded(tensors.steps, context_->kernels.width)),
      pooled_(tensors.pooled, tensors.pooled + tensors.prompts * tensors.prompt_dim),
      prompts_(tensors.prompts) {
  const ContextNet& net = context_->net();
  if (net.width == 0) return;
  const TileKernels& kernels = context_->kernels;
  const int heads = net.heads, each = net.head_width(), steps = tensors.steps, layers = net.layers;
  const bool waypoints = net.waypoint_query.packed_tiles != nullptr;
  const float scale = 1.0f / std::sqrt(static_cast<float>(each));
  const std::size_t each_prompt = static_cast<std::size_t>(2 * layers + 1) * heads;
  layers_.resize(each_prompt * prompts_.size());
  lay_out(memory_, [&](Allocator& memory) {
    for (std::ptrdiff_t p = 0; p < count_; ++p) {
      ContextPrompt& prompt = prompts_[p];
      PackedLayer *keys = layers_.data() + p * each_prompt, *values = keys + layers * heads,
                  *waypoint_keys = values + layers * heads;
      const auto head = [&](const float* all, int number) {
        return all + (p * heads + number) * static_cast<std::ptrdiff_t>(steps) * each;
      };
      for (int i = 0; i < layers * heads; ++i) {
        keys[i] = pack_head(head(tensors.keys[i / heads], i % heads), each, 1, steps, each, scale, kernels, memory);
        values[i] = pack_head(head(tensors.values[i / heads], i % heads), 1, each, each, steps, 1.0f, kernels, memory);
      }
      prompt = {};
      prompt.query_init = copy_padded(tensors.query_init + p * net.width, net.width, kernels, memory);
      prompt.steps = steps;
      prompt.steps_padded = steps_padded_;
      prompt.bias = pad_bias(tensors.bias + p * steps, steps, steps_padded_, memory);
      prompt.keys = keys;
      prompt.values = values;
      if (!waypoints) continue;
      for (int i = 0; i < heads; ++i) {
        waypoint_keys[i] = pack_head(head(tensors.waypoint_key, i), each, 1, steps, each, scale, kernels, memory);
      }
      prompt.waypoint_keys = waypoint_keys;
      prompt.waypoint_bias = pad_bias(tensors.waypoint_bias + p * steps, steps, steps_padded_, memory);
      const float* raw = tensors.waypoints + p * static_cast<std::ptrdiff_t>(steps) * net.found_dim();
      prompt.waypoints = pack_head(raw, 1, net.found_dim(), net.found_dim(), steps, 1.0f, kernels, memory);
      if (tensors.there && net.similarity) {
        const float* there = tensors.there + p * static_cast<std::ptrdiff_t>(steps) * net.compared();
        prompt.there = transpose_padded(there, steps, net.compared(), steps_padded_, memory);
      }
    }
  });
}

void run_context(const Prompts& prompts, const ActingBatch& batch, int threads, float* condition) {
  const Context& context = prompts.context();
  const ContextNet& net = context.net();
  const TileKernels& kernels = context.kernels;
  const std::vector<float>& periods = context.features().periods;
  thread_local Arena arena;
  float *embedding = nullptr, *moments = nullptr;
  lay_out(arena, [&](Allocator& memory) {
    embedding = memory.take(batch.states * net.embedding_dim);
    moments = memory.take(batch.states);
  });
  const std::ptrdiff_t count = static_cast<std::ptrdiff_t>(periods.size());
  for (std::ptrdiff_t row = 0; row < batch.states; ++row) {
    const double time = static_cast<double>(batch.times[row]);
    moments[row] = static_cast<float>(time) / context.features().time_unit;
    for (std::ptrdiff_t i = 0; i < count; ++i) {
      const double angle = kTwoPi * time / periods[i];
      embedding[row * net.embedding_dim + i] = static_cast<float>(std::sin(angle));
      embedding[row * net.embedding_dim + count + i] = static_cast<float>(std::cos(angle));
    }
  }
  const ContextBatch rows{batch.observations, embedding, moments, prompts.prompts(), batch.prompt_of, condition};
  const std::size_t scratch_floats = context.layers.context_scratch(net, prompts.steps_padded());
  const RowSplit parts(batch.states, kernels.max_rows, threads);
  parallel_for(parts.count(), threads, [&](int i) {
    thread_local Arena scratch;
    const Part part = parts[i];
    context.layers.context_rows(net, rows, part.first, part.rows, prompts.steps_padded(), scratch.reserve(scratch_floats));
  });
}

void read_features(const Context& context, std::ptrdiff_t rows, const float* observations, int threads, float* own,
                   float* geometry) {
  constexpr std::ptrdiff_t kRows = 64;  // of a task
  const ContextNet& net = context.net();
  parallel_for(static_cast<int>((rows + kRows - 1) / kRows), threads, [&](int task) {
    thread_local Arena scratch;
    const std::ptrdiff_t first = task * kRows;
    context.layers.feature_rows(net, observations + first * net.state_dim, std::min(kRows, rows - first),
                                own + first * net.own.count, geometry + first * net.geometry.count,
                                scratch.reserve(context.layers.feature_scratch(net)));
  });
}

void act(const Prompts& prompts, const Sampler& sampler, const Actor* actor, const ActingBatch& batch, int threads,
         float* actions) {
  thread_local Arena arena;
  const bool own = batch.prompt_of != nullptr;
  const std::ptrdiff_t width = prompts.context().net().output_dim, prompt_dim = prompts.prompt_dim();
  float *condition = nullptr, *gathered = nullptr;
  lay_out(arena, [&](Allocator& memory) {
    condition = memory.take(batch.states * width);
    gathered = memory.take(own ? batch.states * prompt_dim : 0);
  });
  run_context(prompts, batch, threads, condition);
  for (std::ptrdiff_t row = 0; own && row < batch.states; ++row) {
    std::copy_n(prompts.pooled() + batch.prompt_of[row] * prompt_dim, prompt_dim, gathered + row * prompt_dim);
  }
  const float* prompt = own ? gathered : prompts.pooled();
  if (actor) {
    actor->act(batch.states, condition, prompt, own, batch.keys, threads, actions);
  } else {
    sampler.run({batch.states, 1, condition, prompt, own, {nullptr, batch.keys, true}}, threads, actions);
  }
}

}  // namespace llmdpd
