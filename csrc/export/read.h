// From files to what acts: as bind_context.cpp and bind_sampler.cpp make it of Python's arrays.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "actor.h"
#include "context.h"
#include "file.h"
#include "sampler.h"
#include "tracker.h"

namespace llmdpd {

// What a policy's file holds, packed.
struct Weights {
  std::uint64_t fingerprint;
  int observed_dim, action_dim, chunk, horizon;
  std::vector<int> remembered;  // columns of the observation whose values one step before follow it
  std::vector<double> centre, half;  // of the actions' bounds; empty: actions are the network's numbers
  std::vector<float> low, high;
  std::shared_ptr<const Context> context;
  std::shared_ptr<const Sampler> sampler;
  std::unique_ptr<const Actor> actor;  // null: one sample is taken
  Scene scene;
};

Weights read_weights(const File& file);
std::unique_ptr<const Prompts> read_prompt(const File& file, const Weights& weights);
// Null where the policy acts alone, under a prompt without demonstrations too.
std::unique_ptr<const Takeover> read_takeover(const File& file, const Weights& weights);

}  // namespace llmdpd
