#include <algorithm>

#include "reading.h"

namespace llmdpd {

Linear PromptReading::EncoderLayer::part(int which) const {
  const int width = projection.columns;
  const std::ptrdiff_t first = static_cast<std::ptrdiff_t>(which) * width;
  return {{projection.data + first * width, width, width, width}, projection_bias.data + first};
}

LinearTarget PromptReading::EncoderLayer::part_target(int which, float* gradients) const {
  const std::ptrdiff_t width = projection.columns, first = which * width;
  return {gradients + projection.at + first * width, gradients + projection_bias.at + first};
}

PromptReading::PromptReading(const ContextShape& shape, const PromptsShown& shown, const std::vector<Weight>& weights,
                             const LayerTools& tools)
    : shape_(shape), shown_(shown), tools_(tools) {
  WeightsInOrder order(weights);
  for (int i = 0, inputs = shown.text_dim; shape.text && i < 3; ++i) {
    text_head_.push_back(order.linear(-1, inputs, "text head"));
    inputs = text_head_.back().outputs();
  }
  embed_ = order.linear(-1, -1, "embedding");
  const int width = embed_.outputs();
  position_ = order.plain(width, shown.token_dim - embed_.inputs(), "position");
  for (int i = 0; i < shape.encoder_layers; ++i) {
    EncoderLayer layer{};
    layer.norm1 = order.norm(width, "encoder's norm");
    layer.projection = order.plain(3 * width, width, "projection");
    layer.projection_bias = order.plain(3 * width, 0, "projection");
    layer.out = order.linear(width, width, "encoder's output");
    layer.norm2 = order.norm(width, "encoder's norm");
    layer.widen = order.linear(-1, width, "feed-forward");
    layer.narrow = order.linear(width, layer.widen.outputs(), "feed-forward");
    encoder_.push_back(layer);
  }
  encoder_norm_ = order.norm(width, "encoder's norm");
  head_.push_back(order.linear(-1, width, "head"));
  head_.push_back(order.linear(-1, head_[0].outputs(), "head"));
  step_ = order.linear(-1, width + shown.embedded_dim, "step");
  nothing_ = order.plain(step_.outputs(), 0, "nothing");
  for (int i = 0; i < shape.layers; ++i) {
    const NormWeights norm = order.norm(step_.outputs(), "memory's norm");
    const LinearWeights key = order.linear(step_.outputs(), step_.outputs(), "key");
    layers_.push_back({norm, key, order.linear(step_.outputs(), step_.outputs(), "value")});
  }
  if (shape.waypoints) waypoint_key_ = order.linear(step_.outputs(), step_.outputs(), "waypoint key");
  order.end();
  numbers_ = order.numbers();
  if (shape.encoder_layers > 0 && width % shape.encoder_heads != 0) throw std::invalid_argument("wrong number: heads");
}

struct PromptReading::Kept {
  MlpPass text, head;
  float* tokens_weight;  // [W, token_dim]: the embedding's columns, then the positions'
  LinearPass tokens, step, waypoint_key;
  struct Encoder {
    LinearPass memory;
    float *key, *value;
    AttentionPass attention;
  };
  std::vector<Encoder> encoder;
  std::vector<float*> hidden;  // [P T, W]: before each layer, and after the last
  LinearPass norm;
  float *encoded, *mean, *streams, *stepped, *steps;
  std::vector<LinearPass> layers;
};

void PromptReading::plan(Allocator& tape, Kept& kept) const {
  const std::ptrdiff_t rows = steps(), flat = rows + shown_.prompts;
  const int width = embed_.outputs();
  if (shape_.text) kept.text.plan(shown_.text, shown_.prompts, text_head_, tools_, tape);
  kept.tokens_weight = tape.take(static_cast<std::size_t>(width) * shown_.token_dim);
  const Matrix tokens{kept.tokens_weight, shown_.token_dim, width, shown_.token_dim};
  kept.tokens.plan(shown_.tokens, rows, shown_.token_dim, nullptr, {{tokens, embed_.layer.bias}}, tools_, tape);
  kept.hidden.assign(encoder_.size() + 1, nullptr);
  for (float*& hidden : kept.hidden) hidden = tape.take(rows * width);
  kept.encoder.resize(encoder_.size());
  for (std::size_t i = 0; i < encoder_.size(); ++i) {
    const EncoderLayer& layer = encoder_[i];
    Kept::Encoder& of = kept.encoder[i];
    of.memory.plan(kept.hidden[i], rows, width, &layer.norm1, {layer.part(1), layer.part(2)}, tools_, tape);
    of.key = tape.take(rows * width);
    of.value = tape.take(rows * width);
    of.attention.plan({shown_.prompts, shown_.steps, shown_.steps, width, layer.widen.outputs(), shape_.encoder_heads,
                       kept.hidden[i], of.key, of.value, shown_.bias, layer.norm1.norm, layer.norm2.norm, layer.part(0),
                       layer.out.layer, layer.widen.layer, layer.narrow.layer},
                      tools_, tape);
  }
  kept.norm.plan(kept.hidden.back(), rows, width, &encoder_norm_, {}, tools_, tape);
  kept.encoded = tape.take(rows * width);
  kept.mean = tape.take(static_cast<std::size_t>(shown_.prompts) * width);
  kept.head.plan(kept.mean, shown_.prompts, head_, tools_, tape);
  kept.streams = shown_.embedded ? tape.take(rows * step_.inputs()) : kept.encoded;
  kept.step.plan(kept.streams, rows, step_.inputs(), nullptr, {step_.layer}, tools_, tape);
  kept.stepped = tape.take(rows * step_.outputs());
  kept.steps = tape.take(flat * step_.outputs());
  kept.layers.resize(layers_.size());
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    const MemoryLayer& layer = layers_[i];
    kept.layers[i].plan(kept.steps, flat, step_.outputs(), &layer.norm, {layer.key.layer, layer.value.layer}, tools_,
                        tape);
  }
  if (shape_.waypoints) {
    kept.waypoint_key.plan(kept.steps, flat, step_.outputs(), nullptr, {waypoint_key_.layer}, tools_, tape);
  }
}

std::size_t PromptReading::tape_floats() const {
  Allocator count(nullptr);
  Kept kept{};
  plan(count, kept);
  return count.used();
}

void PromptReading::forward(float* tape, float* pooled, const std::vector<float*>& rows) {
  Allocator memory(tape);
  Kept kept{};
  plan(memory, kept);
  const int prompts = shown_.prompts, count = shown_.steps, width = embed_.outputs(), stepped = step_.outputs();
  if (shape_.text) {
    const float* vectors = kept.text.forward(tools_);
    for (int p = 0; p < prompts; ++p) {
      const float keep = shown_.keep_text ? shown_.keep_text[p] : 1.0f;
      for (int i = 0; i < text_dim(); ++i) pooled[p * vector_dim() + i] = keep * vectors[p * text_dim() + i];
    }
  }
  const LayerTools alone{tools_.tile, tools_.layers, 1};
  copy_columns({embed_.layer.weight.data, embed_.inputs()}, {kept.tokens_weight, shown_.token_dim}, width,
               embed_.inputs(), alone);
  copy_columns({position_.data, position_.columns}, {kept.tokens_weight + embed_.inputs(), shown_.token_dim}, width,
               position_.columns, alone);
  kept.tokens.forward({kept.hidden[0]}, tools_);
  for (std::size_t i = 0; i < encoder_.size(); ++i) {
    kept.encoder[i].memory.forward({kept.encoder[i].key, kept.encoder[i].value}, tools_);
    kept.encoder[i].attention.forward(kept.hidden[i + 1], tools_);
  }
  kept.norm.forward({kept.encoded}, tools_);
  for (int p = 0; p < prompts; ++p) {
    float* mean = kept.mean + p * width;
    std::fill_n(mean, width, 0.0f);
    float real = 0.0f;
    for (int t = 0; t < count; ++t) {
      const float mask = shown_.mask[p * count + t];
      real += mask;
      const float* from = kept.encoded + (static_cast<std::ptrdiff_t>(p) * count + t) * width;
      for (int c = 0; c < width; ++c) mean[c] += mask * from[c];
    }
    for (int c = 0; c < width; ++c) mean[c] /= real;
  }
  const float* vectors = kept.head.forward(tools_);
  const int trajectory_dim = head_.back().outputs();
  for (int p = 0; p < prompts; ++p) {
    const float keep = shown_.keep_trajectory ? shown_.keep_trajectory[p] : 1.0f;
    float* to = pooled + p * vector_dim() + text_dim();
    for (int i = 0; i < trajectory_dim; ++i) to[i] = keep * vectors[p * trajectory_dim + i];
  }
  if (shown_.embedded) {
    copy_columns({kept.encoded, width}, {kept.streams, step_.inputs()}, steps(), width, tools_);
    copy_columns({shown_.embedded, shown_.embedded_dim}, {kept.streams + width, step_.inputs()}, steps(),
                 shown_.embedded_dim, tools_);
  }
  kept.step.forward({kept.stepped}, tools_);
  const std::ptrdiff_t block = static_cast<std::ptrdiff_t>(count) * stepped;
  for (int p = 0; p < prompts; ++p) {
    float* to = kept.steps + p * (block + stepped);
    std::copy_n(kept.stepped + p * block, block, to);
    std::copy_n(nothing_.data, stepped, to + block);
  }
  for (std::size_t i = 0; i < layers_.size(); ++i) kept.layers[i].forward({rows[2 * i], rows[2 * i + 1]}, tools_);
  if (shape_.waypoints) kept.waypoint_key.forward({rows.back()}, tools_);
}

void PromptReading::backward(float* tape, const float* d_pooled, const std::vector<const float*>& d_rows,
                             float* gradients) {
  thread_local Arena arena;
  Allocator memory(tape);
  Kept kept{};
  plan(memory, kept);
  const int prompts = shown_.prompts, count = shown_.steps, width = embed_.outputs();
  const int trajectory_dim = head_.back().outputs();
  float *d_text = nullptr, *d_vector = nullptr, *d_mean = nullptr, *d_encoded = nullptr;
  lay_out(arena, [&](Allocator& parts) {
    d_text = parts.take(prompts * text_dim());
    d_vector = parts.take(prompts * trajectory_dim);
    d_mean = parts.take(static_cast<std::size_t>(prompts) * width);
    d_encoded = parts.take(steps() * width);
  });
  const auto part_of = [&](int first, int size, const float* keep, float* to) {
    for (int p = 0; p < prompts; ++p) {
      for (int i = 0; i < size; ++i) {
        to[p * size + i] = (keep ? keep[p] : 1.0f) * d_pooled[p * vector_dim() + first + i];
      }
    }
  };
  if (shape_.text) {
    part_of(0, text_dim(), shown_.keep_text, d_text);
    kept.text.backward(d_text, nullptr, gradients, tools_);
  }
  part_of(text_dim(), trajectory_dim, shown_.keep_trajectory, d_vector);
  kept.head.backward(d_vector, d_mean, gradients, tools_);
  backward_memory(kept, d_rows, d_encoded, gradients);
  for (int p = 0; p < prompts; ++p) {
    float real = 0.0f;
    for (int t = 0; t < count; ++t) real += shown_.mask[p * count + t];
    for (int t = 0; t < count; ++t) {
      const float share = shown_.mask[p * count + t] / real;
      float* to = d_encoded + (static_cast<std::ptrdiff_t>(p) * count + t) * width;
      for (int c = 0; c < width; ++c) to[c] += share * d_mean[p * width + c];
    }
  }
  backward_encoder(kept, d_encoded, gradients);
}

void PromptReading::backward_memory(Kept& kept, const std::vector<const float*>& d_rows, float* d_encoded,
                                    float* gradients) const {
  thread_local Arena arena;
  const int prompts = shown_.prompts, count = shown_.steps, width = step_.outputs();
  const std::ptrdiff_t flat = steps() + prompts, block = static_cast<std::ptrdiff_t>(count) * width;
  float *d_steps = nullptr, *part = nullptr, *d_stepped = nullptr, *d_streams = nullptr;
  lay_out(arena, [&](Allocator& parts) {
    d_steps = parts.take(flat * width);
    part = parts.take(flat * width);
    d_stepped = parts.take(steps() * width);
    d_streams = parts.take(steps() * step_.inputs());
  });
  std::fill_n(d_steps, flat * width, 0.0f);
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    const MemoryLayer& layer = layers_[i];
    kept.layers[i].backward({d_rows[2 * i], d_rows[2 * i + 1]}, part, layer.norm.target(gradients),
                            {layer.key.target(gradients), layer.value.target(gradients)}, tools_);
    add_columns({part, width}, {d_steps, width}, flat, width, tools_);
  }
  if (shape_.waypoints) {
    kept.waypoint_key.backward({d_rows.back()}, part, {}, {waypoint_key_.target(gradients)}, tools_);
    add_columns({part, width}, {d_steps, width}, flat, width, tools_);
  }
  float* d_nothing = gradients + nothing_.at;
  std::fill_n(d_nothing, width, 0.0f);
  for (int p = 0; p < prompts; ++p) {
    const float* from = d_steps + p * (block + width);
    std::copy_n(from, block, d_stepped + p * block);
    for (int c = 0; c < width; ++c) d_nothing[c] += from[block + c];
  }
  kept.step.backward({d_stepped}, d_streams, {}, {step_.target(gradients)}, tools_);
  copy_columns({d_streams, step_.inputs()}, {d_encoded, embed_.outputs()}, steps(), embed_.outputs(), tools_);
}

void PromptReading::backward_encoder(Kept& kept, float* d_encoded, float* gradients) const {
  thread_local Arena arena;
  const int width = embed_.outputs();
  const std::ptrdiff_t rows = steps();
  float *d_hidden = nullptr, *d_attended = nullptr, *d_key = nullptr, *d_value = nullptr;
  float *second = nullptr, *d_tokens = nullptr;
  lay_out(arena, [&](Allocator& parts) {
    for (float** part : {&d_hidden, &d_attended, &d_key, &d_value}) *part = parts.take(rows * width);
    second = parts.take(2 * static_cast<std::size_t>(width));
    d_tokens = parts.take(static_cast<std::size_t>(width) * shown_.token_dim);
  });
  kept.norm.backward({d_encoded}, d_hidden, encoder_norm_.target(gradients), {}, tools_);
  for (std::size_t i = encoder_.size(); i-- > 0;) {
    const EncoderLayer& layer = encoder_[i];
    const NormTarget norm1 = layer.norm1.target(gradients), of_memory{second, second + width};
    kept.encoder[i].attention.backward(d_hidden,
                                       {d_attended, d_key, d_value, norm1, layer.norm2.target(gradients),
                                        layer.part_target(0, gradients), layer.out.target(gradients),
                                        layer.widen.target(gradients), layer.narrow.target(gradients)},
                                       tools_);
    kept.encoder[i].memory.backward({d_key, d_value}, d_hidden, of_memory,
                                    {layer.part_target(1, gradients), layer.part_target(2, gradients)}, tools_);
    for (int c = 0; c < width; ++c) {  // the norm is before both
      norm1.weight[c] += of_memory.weight[c];
      norm1.bias[c] += of_memory.bias[c];
    }
    add_columns({d_attended, width}, {d_hidden, width}, rows, width, tools_);
  }
  const LinearTarget embed = embed_.target(gradients);
  kept.tokens.backward({d_hidden}, nullptr, {}, {{d_tokens, embed.bias}}, tools_);
  const LayerTools alone{tools_.tile, tools_.layers, 1};
  copy_columns({d_tokens, shown_.token_dim}, {embed.weight, embed_.inputs()}, width, embed_.inputs(), alone);
  copy_columns({d_tokens + embed_.inputs(), shown_.token_dim}, {gradients + position_.at, position_.columns}, width,
               position_.columns, alone);
}

}  // namespace llmdpd
