#include "read.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "instruction_set.h"
#include "llmdpd_policy.h"

namespace llmdpd {
namespace {

constexpr std::int64_t kMaxWidth = 1 << 20;  // of a layer: sums and products of a few of them are no overflow
constexpr int kMaxHeads = 4096;
constexpr std::int64_t kMaxSteps = 1 << 24;  // of demonstrations

int bounded(std::int64_t number, std::int64_t low, std::int64_t high, const char* what) {
  if (number < low || number > high) refuse(std::string("out of range: ") + what);
  return static_cast<int>(number);
}

Linear linear_of(const File& file, const std::string& name, int outputs, int inputs, int columns) {
  return {{file.floats(name + ".weight", {outputs, columns}), columns, outputs, inputs},
          file.floats(name + ".bias", {outputs})};
}

Norm norm_of(const File& file, const std::string& name, int width) {
  return {file.floats(name + ".weight", {width}), file.floats(name + ".bias", {width})};
}

std::vector<Feature> features_of(const File& file, const std::string& name, int state_dim, int points) {
  const Tensor& table = file.tensor(name + ".kinds", Tensor::kInteger, 2);
  const int count = bounded(table.shape[0], 0, kMaxWidth, "features");
  const std::int32_t* k = file.integers(name + ".kinds", {count, 5});
  const float* numbers = file.floats(name + ".numbers", {count, 2});
  std::vector<Feature> features;
  for (int i = 0; i < count; ++i, k += 5, numbers += 2) {
    const auto within = [](std::int32_t index, std::int32_t low, int high) { return index >= low && index < high; };
    if (!within(k[0], 0, 4) || !within(k[1], 0, state_dim) || !within(k[2], 0, state_dim) ||
        !within(k[3], -1, points) || !within(k[4], -1, points)) {
      refuse("a feature of what is not there: " + name);
    }
    features.push_back({k[0], k[1], k[2], {k[3], k[4]}, numbers[0], numbers[1]});
  }
  return features;
}

ContextFeatures context_features(const File& file, int state_dim, float time_unit) {
  ContextFeatures features{};
  const Tensor& ends = file.tensor("points.ends", Tensor::kInteger, 1);
  const Tensor& columns = file.tensor("points.columns", Tensor::kInteger, 1);
  const auto *end = static_cast<const std::int32_t*>(ends.data), *column = static_cast<const std::int32_t*>(columns.data);
  features.point_ends.assign(end, end + ends.count);
  features.point_columns.assign(column, column + columns.count);
  for (const std::int32_t one : features.point_columns) {
    if (one < 0 || one >= state_dim) refuse("a point of what is not there");
  }
  std::int64_t last = 0;
  for (const std::int32_t one : features.point_ends) {
    if (one < last || one > static_cast<std::int64_t>(columns.count)) refuse("points out of order");
    last = one;
  }
  const int points = bounded(static_cast<std::int64_t>(ends.count), 0, kMaxWidth, "points");
  features.own = features_of(file, "own", state_dim, points);
  features.geometry = features_of(file, "geometry", state_dim, points);
  const Tensor& periods = file.tensor("periods", Tensor::kFloat, 1);
  const auto* period = static_cast<const float*>(periods.data);
  features.periods.assign(period, period + periods.count);
  bounded(static_cast<std::int64_t>(periods.count), 0, kMaxWidth, "periods");
  features.time_unit = time_unit;
  return features;
}

// The names of `RetrievalContext`'s state; those of parts that are switched off are absent.
ContextWeights attention_weights(const File& file, const ContextFeatures& features, ContextSizes& sizes) {
  ContextWeights weights{};
  if (!file.has("query.weight")) return weights;
  const std::vector<int>& shape = file.tensor("query.weight", Tensor::kFloat, 2).shape;
  const int width = bounded(shape[0], 1, kMaxWidth, "width");
  const int streams = static_cast<int>(features.own.size() + 2 * features.periods.size());
  if (sizes.heads < 1 || width % sizes.heads != 0 || shape[1] < streams) refuse("wrong sizes of the attention");
  sizes.width = width;
  weights.query = linear_of(file, "query", width, streams, shape[1]);
  for (; file.has("layers." + std::to_string(sizes.layers) + ".query.weight"); ++sizes.layers) {
    const std::string layer = "layers." + std::to_string(sizes.layers) + ".";
    weights.attention.push_back({norm_of(file, layer + "query_norm", width),
                                 norm_of(file, layer + "forward_norm", width),
                                 linear_of(file, layer + "query", width, width, width),
                                 linear_of(file, layer + "out", width, width, width),
                                 linear_of(file, layer + "widen", 2 * width, width, width),
                                 linear_of(file, layer + "narrow", width, 2 * width, 2 * width)});
  }
  if (file.has("norm.weight")) weights.norm = norm_of(file, "norm", width);
  if (!file.has("waypoint_query.weight")) return weights;
  weights.waypoint_query = linear_of(file, "waypoint_query", width, width, width);
  const int compared = static_cast<int>(features.geometry.size()) + (features.periods.empty() ? 0 : 1);
  if (file.has("likeness")) weights.similarity = file.floats("likeness", {sizes.heads, compared});
  return weights;
}

// The condition's state part, which the first layer of the noise network must have columns for.
std::int64_t condition_size(const ContextSizes& sizes, const ContextFeatures& features, const ContextWeights& weights) {
  std::int64_t size = static_cast<std::int64_t>(features.own.size() + 2 * features.periods.size());
  if (weights.norm.weight) size += sizes.width;
  if (weights.waypoint_query.weight.data) {
    const auto geometry = static_cast<std::int64_t>(features.geometry.size());
    size += sizes.heads * (sizes.action_dim + 2 * sizes.lookaheads * geometry);
  }
  return size;
}

struct Layers {
  const float *first_weight, *first_bias;
  int columns;
  TrunkWeights trunk;
};

Layers layers_of(const File& file, const std::string& name, int outputs) {
  const std::vector<int>& shape = file.tensor(name + ".0.weight", Tensor::kFloat, 2).shape;
  const int hidden = bounded(shape[0], 1, kMaxWidth, "hidden width"), columns = bounded(shape[1], 0, kMaxWidth, "inputs");
  const auto layer = [&](int number, int to, int from) {
    const std::string part = name + "." + std::to_string(number);
    return std::make_pair(file.floats(part + ".weight", {to, from}), file.floats(part + ".bias", {to}));
  };
  const auto first = layer(0, hidden, columns), second = layer(1, hidden, hidden), third = layer(2, hidden, hidden),
             last = layer(3, outputs, hidden);
  return {first.first, first.second, columns,
          {hidden, outputs, second.first, second.second, third.first, third.second, last.first, last.second}};
}

std::shared_ptr<const PackedCritic> critic_of(const File& file, const std::string& name, const NetDims& dims,
                                              const TileKernels& kernels) {
  const Layers layers = layers_of(file, name, 1);
  const int prompt_dim = layers.columns - dims.state - dims.action;
  if (prompt_dim != 0 && prompt_dim != dims.prompt) refuse("wrong sizes of the critics");
  return std::make_shared<PackedCritic>(dims.state, dims.action, prompt_dim, layers.first_weight, layers.first_bias,
                                        layers.trunk, kernels);
}

void read_scale(const File& file, Weights& weights) {
  if (!file.has("scale")) return;
  const int width = weights.action_dim;
  const double* from = file.doubles("scale", {4, width});
  weights.centre.assign(from, from + width);
  weights.half.assign(from + width, from + 2 * width);
  weights.low.assign(from + 2 * width, from + 3 * width);
  weights.high.assign(from + 3 * width, from + 4 * width);
}

std::vector<int> columns_of(const File& file, const std::string& name, int width) {
  const Tensor& columns = file.tensor(name, Tensor::kInteger, 1);
  const auto* column = static_cast<const std::int32_t*>(columns.data);
  for (std::size_t i = 0; i < columns.count; ++i) {
    if (column[i] < 0 || column[i] >= width) refuse("a column that is not there: " + name);
  }
  return {column, column + columns.count};
}

Scene scene_of(const File& file, int observed_dim, int action_dim) {
  Scene scene;
  if (!file.has("scene.points")) return scene;
  const int dims = bounded(file.tensor("scene.points", Tensor::kInteger, 2).shape[1], 2, 3, "coordinates");
  const std::int32_t* point = file.integers("scene.points", {3, dims});
  for (std::vector<int>* columns : {&scene.body, &scene.object, &scene.goal}) {
    for (int d = 0; d < dims; ++d) columns->push_back(bounded(*point++, 0, observed_dim - 1, "point"));
  }
  scene.gripper = columns_of(file, "scene.gripper", observed_dim);
  scene.move = columns_of(file, "scene.move", action_dim);
  scene.grip = columns_of(file, "scene.grip", action_dim);
  if (scene.move.size() != static_cast<std::size_t>(dims)) refuse("wrong shape: scene.move");
  const float* bounds = file.floats("scene.bounds", {2, action_dim});
  scene.low.assign(bounds, bounds + action_dim);
  scene.high.assign(bounds + action_dim, bounds + 2 * action_dim);
  const double* numbers = file.doubles("scene.numbers", {2});
  scene.metres = numbers[0];
  scene.after = numbers[1];
  if (!(scene.metres > 0) || !(scene.after > 0)) refuse("out of range: scene.numbers");
  scene.dims = dims;
  return scene;
}

std::vector<Track> tracks_of(const File& file, const Scene& scene) {
  if (scene.dims == 0) refuse("tracks of a policy that does not hand over");
  const Tensor& ends = file.tensor("track.ends", Tensor::kInteger, 1);
  const int count = bounded(static_cast<std::int64_t>(ends.count), 1, kMaxWidth, "tracks");
  const auto* end = static_cast<const std::int32_t*>(ends.data);
  for (int k = 0; k < count; ++k) bounded(end[k], k ? std::int64_t{end[k - 1]} + 1 : 1, kMaxSteps, "steps of a track");
  const int total = end[count - 1], dims = scene.dims, readings = static_cast<int>(scene.gripper.size());
  const int width = static_cast<int>(scene.low.size());
  std::vector<Track> tracks(count);
  const auto split = [&](const float* numbers, int each, std::vector<float> Track::*part) {
    for (int k = 0; k < count; ++k) {
      const std::ptrdiff_t first = k ? end[k - 1] : 0;
      (tracks[k].*part).assign(numbers + first * each, numbers + std::ptrdiff_t{end[k]} * each);
    }
  };
  split(file.floats("track.body", {total, dims}), dims, &Track::body);
  split(file.floats("track.object", {total, dims}), dims, &Track::object);
  split(file.floats("track.held", {total, dims}), dims, &Track::held);
  split(file.floats("track.to_goal", {total}), 1, &Track::to_goal);
  split(file.floats("track.actions", {total, width}), width, &Track::actions);
  split(file.floats("track.open", {total, readings}), readings, &Track::open);
  const float *goal = file.floats("track.goal", {count, dims}), *gain = file.floats("track.gain", {count});
  for (int k = 0; k < count; ++k) {
    Track& track = tracks[k];
    track.steps = end[k] - (k ? end[k - 1] : 0);
    track.goal.assign(goal + k * dims, goal + (k + 1) * dims);
    track.gain = gain[k];
    track.has_object = true;
    for (auto object = track.object.begin(); object != track.object.end(); object += dims) {
      track.has_object &= std::any_of(object, object + dims, [](float number) { return number != 0.0f; });
    }
    for (int g = 0; g < readings; ++g) {
      float least = track.open[g], most = track.open[g];
      for (std::size_t i = g; i < track.open.size(); i += readings) {
        least = std::min(least, track.open[i]);
        most = std::max(most, track.open[i]);
      }
      // What hardly moves says nothing.
      track.opening.push_back(std::max(most - least, 0.1f * std::max(std::abs(least), std::abs(most))) + 1e-9f);
    }
  }
  return tracks;
}

}  // namespace

Weights read_weights(const File& file) {
  const InstructionSet& isa = best_instruction_set();
  const std::int32_t* sizes = file.integers("sizes", {9});
  const float* scalars = file.floats("scalars", {4});
  const float start = scalars[0], clip = scalars[1], time_unit = scalars[2], temperature = scalars[3];
  if (!std::isfinite(start) || !(clip > 0) || !(time_unit > 0) || !(temperature > 0)) refuse("out of range: scalars");
  Weights weights{};
  weights.fingerprint = file.fingerprint();
  weights.observed_dim = bounded(sizes[0], 1, kMaxWidth, "observation");
  weights.action_dim = bounded(sizes[1], 1, 4096, "action");
  weights.chunk = bounded(sizes[2], 1, 4096, "chunk");
  weights.horizon = bounded(sizes[3], 1, weights.chunk, "action horizon");
  const Tensor& remembered = file.tensor("remembered", Tensor::kInteger, 1);
  const auto* column = static_cast<const std::int32_t*>(remembered.data);
  weights.remembered.assign(column, column + remembered.count);
  for (const int one : weights.remembered) bounded(one, 0, weights.observed_dim - 1, "remembered number");
  read_scale(file, weights);
  weights.scene = scene_of(file, weights.observed_dim, weights.action_dim);
  const int state_dim = bounded(weights.observed_dim + static_cast<std::int64_t>(remembered.count), 1, kMaxWidth, "state");

  ContextSizes context{state_dim, 0, bounded(sizes[4], 0, kMaxHeads, "heads"), 0,
                       bounded(sizes[6], 1, 4096, "demonstrated action"), bounded(sizes[5], 0, 4096, "lookaheads")};
  ContextFeatures features = context_features(file, state_dim, time_unit);
  const ContextWeights attention = attention_weights(file, features, context);
  const int condition = bounded(condition_size(context, features, attention), 0, kMaxWidth, "condition");
  weights.context = std::make_shared<Context>(context, std::move(features), attention, *isa.tile, *isa.layers);

  const int numbers = bounded(std::int64_t{weights.chunk} * weights.action_dim, 1, kMaxWidth, "chunk");
  const Layers layers = layers_of(file, "net", numbers);
  const std::vector<int>& times = file.tensor("net.time", Tensor::kFloat, 2).shape;
  const int steps = bounded(times[0], 1, kMaxWidth, "steps");
  NetDims dims{numbers, bounded(times[1], 0, kMaxWidth, "time embedding"), condition, 0, layers.trunk.hidden};
  dims.prompt = bounded(std::int64_t{layers.columns} - dims.action - dims.time - dims.state, 0, kMaxWidth, "prompt vector");
  auto net = std::make_shared<PackedNet>(dims, layers.first_weight, layers.first_bias, layers.trunk, *isa.tile);
  static_assert(sizeof(StepCoefficients) == 6 * sizeof(float), "rows of the table are read in place");
  const auto* table = reinterpret_cast<const StepCoefficients*>(file.floats("net.table", {steps, 6}));
  weights.sampler = std::make_shared<Sampler>(std::move(net), std::vector<StepCoefficients>(table, table + steps),
                                              file.floats("net.time", {steps, dims.time}), start, clip);
  const int samples = bounded(sizes[7], 1, 1 << 16, "samples");
  if (samples > 1) {
    const Selection selection{bounded(sizes[8], 0, 1, "selection") == 1, temperature};
    weights.actor = std::make_unique<Actor>(weights.sampler, critic_of(file, "q1", dims, *isa.tile),
                                            critic_of(file, "q2", dims, *isa.tile), samples, selection);
  }
  return weights;
}

std::unique_ptr<const Prompts> read_prompt(const File& file, const Weights& weights) {
  if (file.fingerprint() != weights.fingerprint) {
    throw Failure(LLMDPD_MISMATCH, "a prompt of another policy: it is exported together with its own");
  }
  const ContextNet& net = weights.context->net();
  PromptTensors tensors{};
  tensors.prompts = 1;
  tensors.prompt_dim = weights.sampler->net().dims.prompt;
  tensors.pooled = file.floats("pooled", {1, tensors.prompt_dim});
  tensors.steps = 1;
  if (net.width > 0) {
    const int steps = bounded(file.tensor("bias", Tensor::kFloat, 2).shape[1], 1, kMaxWidth, "steps"), each = net.head_width();
    const auto heads = [&](const std::string& name) { return file.floats(name, {1, net.heads, steps, each}); };
    tensors.steps = steps;
    tensors.bias = file.floats("bias", {1, steps});
    tensors.query_init = file.floats("query_init", {1, net.width});
    for (int layer = 0; layer < net.layers; ++layer) {
      tensors.keys.push_back(heads("key" + std::to_string(layer)));
      tensors.values.push_back(heads("value" + std::to_string(layer)));
    }
    if (net.waypoint_query.packed_tiles) {
      tensors.waypoint_key = heads("waypoint_key");
      tensors.waypoint_bias = file.floats("waypoint_bias", {1, steps});
      tensors.waypoints = file.floats("waypoints", {1, steps, net.found_dim()});
      if (file.has("there")) tensors.there = file.floats("there", {1, steps, net.compared()});
    }
  }
  return std::make_unique<Prompts>(weights.context, tensors);
}

std::unique_ptr<const Takeover> read_takeover(const File& file, const Weights& weights) {
  if (!file.has("track.ends")) return nullptr;
  return std::make_unique<Takeover>(weights.scene, tracks_of(file, weights.scene));
}

}  // namespace llmdpd
