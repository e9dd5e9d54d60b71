// Every entry point called from several threads at once, each call with several threads of the pool: the same bits as
// one call alone.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <list>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "../mish_mlp.h"
#include "check.h"
#include "inputs.h"

namespace {

using namespace inputs;

// One packed network and sampler for all callers; two prompts, since it remembers the last one.
Call make_sampler(Random& random) {
  struct Inputs {
    Sizes sizes;
    Weights weights;
    Schedule schedule;
    Floats state, prompts[2];
    std::unique_ptr<llmdpd::Sampler> sampler;
  };
  constexpr int kTime = 4;
  const Sizes z(random);
  auto in = std::make_shared<Inputs>(Inputs{z,
                                            Weights(random, z.hidden, z.action + kTime + z.state + z.prompt, z.action),
                                            Schedule(random, z),
                                            normals(random, std::size_t(z.states) * z.state),
                                            {normals(random, z.prompt), normals(random, z.prompt)},
                                            nullptr});
  const llmdpd::NetDims dims{z.action, kTime, z.state, z.prompt, z.hidden};
  const auto net = std::make_shared<llmdpd::PackedNet>(dims, in->weights.first.data(), in->weights.first_bias.data(),
                                                       in->weights.trunk, kernels(random));
  const auto* table = in->schedule.schedule.table;
  in->sampler = std::make_unique<llmdpd::Sampler>(
      net, std::vector<llmdpd::StepCoefficients>(table, table + z.steps),
      normals(random, std::size_t(z.steps) * kTime).data(), 1.0f, in->schedule.schedule.clip);
  return [in](int threads) {
    Floats out;
    for (const Floats& prompt : in->prompts) {
      Floats actions(in->sizes.rows() * in->sizes.action);
      const Sizes& sizes = in->sizes;
      in->sampler->run({sizes.states, sizes.samples, in->state.data(), prompt.data(), false, in->schedule.noise},
                       threads, actions.data());
      out.insert(out.end(), actions.begin(), actions.end());
    }
    return out;
  };
}

// Memory for gradients, exactly as much as they take; `all` joins what was written.
class Targets {
 public:
  float* make(std::size_t floats) { return parts_.emplace_back(floats, -7.0f).data(); }
  Floats all() const {
    Floats joined;
    for (const Floats& part : parts_) joined.insert(joined.end(), part.begin(), part.end());
    return joined;
  }
  llmdpd::GradientTargets trunk(std::size_t hidden, std::size_t outputs) {
    llmdpd::GradientTargets to{};
    to.weights = true;
    to.w2 = make(hidden * hidden), to.b2 = make(hidden), to.w3 = make(hidden * hidden), to.b3 = make(hidden);
    to.w4 = make(outputs * hidden), to.b4 = make(outputs);
    return to;
  }

 private:
  std::list<Floats> parts_;
};

// Forward with a tape, and backward with it and without.
Call make_chain(Random& random) {
  struct Inputs {
    Sizes sizes;
    Weights weights;
    Schedule schedule;
    Floats state, W_s, W_a, init, tau, grad;
    llmdpd::ChainCall call;
  };
  const Sizes z(random);
  const std::size_t hidden = z.hidden;
  const bool own_init = between(random, 0, 1);
  auto in = std::make_shared<Inputs>(Inputs{z, Weights(random, z.hidden, 1, z.action), Schedule(random, z),
                                            normals(random, std::size_t(z.states) * z.state),
                                            normals(random, hidden * z.state, 0.3f),
                                            normals(random, hidden * z.action, 0.3f),
                                            normals(random, own_init ? z.states * hidden : hidden),
                                            normals(random, hidden * z.steps),
                                            normals(random, z.rows() * z.action),
                                            {}});
  llmdpd::ChainCall& call = in->call;
  call.trunk = in->weights.trunk;
  call.W_s = {in->W_s.data(), z.state, z.hidden, z.state};
  call.W_a = {in->W_a.data(), z.action, z.hidden, z.action};
  call.u_z = in->init.data(), call.u_z_per_state = own_init;
  call.tau = in->tau.data();
  call.states = z.states, call.samples = z.samples;
  call.state = in->state.data(), call.state_stride = z.state;
  call.schedule = in->schedule.schedule, call.noise = in->schedule.noise;
  const llmdpd::TileKernels& tile = kernels(random);
  return [in, &tile](int threads) {
    const Sizes& z = in->sizes;
    const std::size_t hidden = z.hidden;
    Targets written;
    Floats tape(llmdpd::chain_tape_floats(in->call, tile));
    llmdpd::chain_forward(in->call, tile, threads, written.make(z.rows() * z.action), tape.data());
    for (const float* kept : {static_cast<const float*>(tape.data()), static_cast<const float*>(nullptr)}) {
      llmdpd::GradientTargets to = written.trunk(hidden, z.action);
      to.input_weight = written.make(hidden * z.state);
      to.x = written.make(std::size_t(z.states) * z.state);
      to.init = written.make(in->call.u_z_per_state ? z.states * hidden : hidden);
      to.init_per_state = in->call.u_z_per_state;
      to.W_a = written.make(hidden * z.action);
      to.tau = written.make(hidden * z.steps);
      llmdpd::chain_backward(in->call, tile, threads, in->grad.data(), kept, to);
    }
    return written.all();
  };
}

Call make_mlp(Random& random) {
  struct Inputs {
    Sizes sizes;
    Weights weights;
    Floats x, init, grad;
    int nets;
    llmdpd::MlpCall call;
  };
  const Sizes z(random);
  const std::size_t hidden = z.hidden;
  const bool own_init = between(random, 0, 1);
  auto in = std::make_shared<Inputs>(Inputs{z, Weights(random, z.hidden, z.state, z.action),
                                            normals(random, z.rows() * z.state),
                                            normals(random, own_init ? z.rows() * hidden : hidden),
                                            normals(random, z.rows() * z.action),
                                            between(random, 1, 2),
                                            {}});
  in->call = {in->weights.trunk,
              {in->weights.first.data(), z.state, z.hidden, z.state},
              in->init.data(),
              own_init,
              static_cast<std::ptrdiff_t>(z.rows()),
              in->x.data(),
              z.state};
  const llmdpd::TileKernels& tile = kernels(random);
  return [in, &tile](int threads) {
    const Sizes& z = in->sizes;
    const std::size_t hidden = z.hidden;
    Targets written;
    const std::vector<llmdpd::MlpCall> calls(in->nets, in->call);
    std::vector<Floats> tapes(in->nets, Floats(llmdpd::mlp_tape_floats(in->call, tile)));
    std::vector<float*> outs, kept;
    for (Floats& tape : tapes) {
      outs.push_back(written.make(z.rows() * z.action));
      kept.push_back(tape.data());
    }
    llmdpd::mlps_forward(calls, tile, threads, outs.data(), kept.data());
    const std::vector<const float*> grads(in->nets, in->grad.data());
    for (const bool with_tapes : {true, false}) {
      std::vector<const float*> from;
      std::vector<llmdpd::GradientTargets> to;
      for (const float* tape : kept) {
        from.push_back(with_tapes ? tape : nullptr);
        to.push_back(written.trunk(hidden, z.action));
        to.back().input_weight = written.make(hidden * z.state);
        to.back().x = written.make(z.rows() * z.state);
        to.back().init = written.make(in->call.init_per_row ? z.rows() * hidden : hidden);
        to.back().init_per_state = in->call.init_per_row;
      }
      llmdpd::mlps_backward(calls, tile, threads, grads.data(), from.data(), to.data());
    }
    return written.all();
  };
}

// A new entry point is a line here.
constexpr Call (*kEntryPoints[])(Random&) = {make_sampler,  make_chain,  make_mlp,       make_acting,
                                            make_features, make_linear, make_attention, make_optimizer,
                                            make_prompt_reading, make_state_reading, make_noise_node,
                                            make_chain_node};

bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace

void test_concurrent_calls() {
  const unsigned seed = std::random_device{}();
  std::printf("concurrent calls: seed %u\n", seed);
  Random random(seed);
  for (const std::string& isa : llmdpd::runnable_isas()) {
    llmdpd::set_isa(isa);
    std::vector<Call> calls;
    std::vector<Floats> expected;
    for (int i = 0; i < 3; ++i) {
      for (const auto make : kEntryPoints) {
        calls.push_back(make(random));
        expected.push_back(calls.back()(1));
        CHECK(same_bits(calls.back()(5), expected.back()));
      }
    }
    std::vector<std::thread> callers;
    for (unsigned caller = 0; caller < 4; ++caller) {
      callers.emplace_back([&, caller] {
        for (std::size_t i = 0; i < 4 * calls.size(); ++i) {
          const std::size_t which = (i * (2 * caller + 1) + caller) % calls.size();
          CHECK(same_bits(calls[which](1 + (i + caller) % 4), expected[which]));
        }
      });
    }
    for (std::thread& caller : callers) caller.join();
  }
}
