// An exported policy in use: `Session` of llmdpd/policy/session.py, for the policies that act in one native call.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "read.h"

namespace llmdpd {

// The seeds of Python's `Seeds`: torch's generator is the Mersenne Twister, of which a number below 2^63 - 1 takes two.
class Seeds {
 public:
  explicit Seeds(std::uint64_t seed) : random_(static_cast<std::uint32_t>(seed)) {}
  std::uint64_t next() {
    const std::uint64_t high = static_cast<std::uint32_t>(random_());
    return (high << 32 | static_cast<std::uint32_t>(random_())) % 0x7FFFFFFFFFFFFFFFull;
  }

 private:
  std::mt19937 random_;
};

class Exported {
 public:
  explicit Exported(const File& file);

  int observed_dim() const { return weights_.observed_dim; }
  int action_dim() const { return weights_.action_dim; }
  void set_prompt(const File& file);
  void seed(std::uint64_t seed);
  void reset();
  void reset_row(std::size_t row);
  void set_step(std::size_t row, std::int64_t step);
  // observations [rows, observed_dim] to actions [rows, action_dim].
  void act(const float* observations, std::size_t rows, float* actions);

 private:
  // An episode: the time step at which it goes on, what is left of its chunk from which step on, and the step after its
  // last observation.
  struct Row {
    std::int64_t step = 0, chunk_step = -1, seen_step = -1;
    int chunk_used = 0;
    bool late = false;     // whether it is the tracker's, in this call
    Course course, going;  // of the tracker; going: what becomes of it if the call succeeds
  };
  void grow(std::size_t rows);
  void track(const float* observations, std::size_t rows);
  void complete(const float* observations, std::size_t rows);
  void sample(std::size_t rows);
  void take(std::size_t rows, float* actions);

  const Weights weights_;
  std::unique_ptr<const Prompts> prompt_;
  std::unique_ptr<const Takeover> takeover_;  // null: the policy acts alone
  Seeds seeds_;
  std::vector<Row> rows_;
  std::vector<float> seen_, chunks_;                 // of each row: its last observation, its last chunk
  std::vector<float> states_, due_states_, sampled_, tracked_;  // of one call
  std::vector<std::int64_t> due_steps_;
  std::vector<std::size_t> due_;
  std::vector<std::uint64_t> keys_;
};

}  // namespace llmdpd
