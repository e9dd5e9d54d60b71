#include "sampler.h"

#include <algorithm>
#include <cstring>

namespace llmdpd {

PackedNet::PackedNet(const NetDims& net_dims, const float* first_weight, const float* first_bias,
                     const TrunkWeights& trunk_weights, const TileKernels& tile_kernels)
    : dims(net_dims), kernels(tile_kernels) {
  const std::ptrdiff_t stride = dims.action + dims.time + dims.state + dims.prompt;
  lay_out(memory_, [&](Allocator& memory) {
    const float* column = first_weight;
    const auto part = [&](int inputs) {
      const PackedLayer layer = pack_single({column, stride, dims.hidden, inputs}, false, kernels, memory);
      column += inputs;
      return layer;
    };
    action = part(dims.action);
    time = part(dims.time);
    state = part(dims.state);
    prompt = part(dims.prompt);
    bias = copy_padded(first_bias, dims.hidden, kernels, memory);
    trunk = pack_trunk(trunk_weights, {true, false}, kernels, memory);
  });
}

Sampler::Sampler(std::shared_ptr<const PackedNet> net, std::vector<StepCoefficients> table, const float* time_embedding,
                 float start, float clip)
    : net_(std::move(net)), table_(std::move(table)), start_(start), clip_(clip) {
  const int width = net_->trunk.hidden_padded;
  const std::vector<float> zeros(width, 0.0f);
  tau_.resize(table_.size() * width);
  net_->kernels.dense(net_->time, time_embedding, net_->dims.time, zeros.data(), 0, tau_.data(), width,
                      static_cast<std::ptrdiff_t>(table_.size()));
}

std::shared_ptr<const Sampler::PromptBase> Sampler::prompt_base(const float* prompt) const {
  const std::size_t count = net_->dims.prompt;
  std::shared_ptr<const PromptBase> last = std::atomic_load(&last_);
  if (last && (count == 0 || std::memcmp(last->prompt.data(), prompt, count * sizeof(float)) == 0)) return last;
  auto made = std::make_shared<PromptBase>();
  made->prompt.assign(prompt, prompt + count);
  made->base.resize(net_->trunk.hidden_padded);
  net_->kernels.dense(net_->prompt, prompt, static_cast<std::ptrdiff_t>(count), net_->bias, 0, made->base.data(), 0, 1);
  last = std::move(made);
  std::atomic_store(&last_, last);
  return last;
}

void Sampler::run(const SamplerBatch& batch, int threads, float* actions) const {
  Chain chain{};
  chain.trunk = net_->trunk;
  chain.first.input = net_->state;
  chain.first.x = batch.state;
  chain.first.x_stride = chain.first.inputs = net_->dims.state;
  chain.first.init_share = 1;
  std::shared_ptr<const PromptBase> base;  // keeps the row alive
  if (batch.prompt_per_state) {
    chain.first.prompt = net_->prompt;
    chain.first.prompts = batch.prompt;
    chain.first.prompt_dim = net_->dims.prompt;
    chain.first.init = net_->bias;
  } else {
    base = prompt_base(batch.prompt);
    chain.first.init = base->base.data();
  }
  chain.action = net_->action;
  chain.action_dim = net_->dims.action;
  chain.steps = steps();
  chain.samples = batch.samples;
  chain.start = start_;
  chain.clip = clip_;
  chain.tau = tau_.data();
  chain.table = table_.data();
  chain.noise = batch.noise.given;
  chain.keys = {batch.noise.keys, batch.noise.key_per_state, batch.samples, chain.action_dim};
  chain.rows = batch.states * batch.samples;
  chain.actions = actions;
  run_chain(chain, net_->kernels, threads);
}

}  // namespace llmdpd
