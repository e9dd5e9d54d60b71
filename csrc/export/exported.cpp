#include "exported.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "llmdpd_policy.h"

namespace llmdpd {
namespace {

constexpr std::size_t kMaxRows = 1 << 20;
constexpr std::int64_t kMaxStep = std::int64_t{1} << 62;

}  // namespace

Exported::Exported(const File& file) : weights_(read_weights(file)), seeds_(0) { grow(1); }

void Exported::set_prompt(const File& file) {
  std::unique_ptr<const Prompts> prompt = read_prompt(file, weights_);
  takeover_ = read_takeover(file, weights_);
  prompt_ = std::move(prompt);
  reset();
}

void Exported::seed(std::uint64_t seed) {
  seeds_ = Seeds(seed);
  for (Row& row : rows_) row.chunk_step = -1;  // what is left was sampled before
}

void Exported::reset() { std::fill(rows_.begin(), rows_.end(), Row{}); }

void Exported::reset_row(std::size_t row) {
  if (row < rows_.size()) rows_[row] = Row{};
}

void Exported::set_step(std::size_t row, std::int64_t step) {
  if (row >= kMaxRows) throw Failure(LLMDPD_ARGUMENT, "row: too many for one policy");
  if (step < 0 || step > kMaxStep) throw Failure(LLMDPD_ARGUMENT, "step: a whole number from 0 on is expected");
  grow(row + 1);
  rows_[row].step = step;
}

void Exported::act(const float* observations, std::size_t rows, float* actions) {
  if (!prompt_) throw Failure(LLMDPD_NO_PROMPT, "the policy has no prompt yet: llmdpd_set_prompt comes first");
  if (rows > kMaxRows) throw Failure(LLMDPD_ARGUMENT, "rows: too many for one call");
  const std::size_t numbers = rows * weights_.observed_dim;
  for (std::size_t i = 0; i < numbers; ++i) {
    if (!std::isfinite(observations[i])) throw Failure(LLMDPD_NUMBER, "NaN or Inf in the observation");
  }
  grow(rows);
  track(observations, rows);
  complete(observations, rows);
  sample(rows);
  take(rows, actions);
}

// Memory for so many rows; those that are new begin.
void Exported::grow(std::size_t rows) {
  if (rows <= rows_.size()) return;
  const std::size_t numbers = static_cast<std::size_t>(weights_.chunk) * weights_.action_dim;
  const std::size_t width = weights_.observed_dim + weights_.remembered.size();
  seen_.resize(weights_.remembered.empty() ? 0 : rows * weights_.observed_dim);
  chunks_.resize(rows * numbers);
  sampled_.resize(rows * numbers);
  states_.resize(rows * width);
  due_states_.resize(rows * width);
  due_steps_.resize(rows);
  tracked_.resize(weights_.scene.dims ? rows * weights_.action_dim : 0);
  due_.reserve(rows);
  keys_.reserve(rows);
  rows_.resize(rows);  // last: what has room for all of them is what counts
}

// Which rows the tracker has, and its actions in those.
void Exported::track(const float* observations, std::size_t rows) {
  if (!takeover_) return;
  const std::size_t width = weights_.action_dim;
  for (std::size_t r = 0; r < rows; ++r) {
    Row& row = rows_[r];
    const float* now = observations + r * weights_.observed_dim;
    float* action = tracked_.data() + r * width;
    row.going = row.course;
    row.late = takeover_->late(row.going, row.step, now);
    if (!row.late) continue;
    takeover_->act(row.going, now, action);
    for (std::size_t i = 0; i < width; ++i) {
      if (!std::isfinite(action[i])) throw Failure(LLMDPD_NUMBER, "NaN or Inf in the action");
    }
  }
}

// states_ [rows, S]: the observations, and what is remembered of the step before; of an episode's first, of itself.
void Exported::complete(const float* observations, std::size_t rows) {
  const std::size_t observed = weights_.observed_dim, width = observed + weights_.remembered.size();
  for (std::size_t r = 0; r < rows; ++r) {
    const float* now = observations + r * observed;
    float* state = states_.data() + r * width;
    std::copy_n(now, observed, state);
    if (weights_.remembered.empty()) continue;
    const bool follows = rows_[r].seen_step == rows_[r].step;
    const float* before = follows ? seen_.data() + r * observed : now;
    for (std::size_t i = 0; i < weights_.remembered.size(); ++i) state[observed + i] = before[weights_.remembered[i]];
  }
}

// A chunk for each of the policy's rows that has none which goes on at its time step.
void Exported::sample(std::size_t rows) {
  const std::size_t numbers = static_cast<std::size_t>(weights_.chunk) * weights_.action_dim;
  const std::size_t width = weights_.observed_dim + weights_.remembered.size();
  due_.clear();
  keys_.clear();
  std::size_t late = 0;
  for (std::size_t r = 0; r < rows; ++r) late += rows_[r].late;
  const bool shared = late > 0 && late < rows;  // then each row takes a seed, as if none were handed over
  Seeds seeds = seeds_;
  for (std::size_t r = 0; r < rows; ++r) {
    const bool due = !rows_[r].late && rows_[r].chunk_step != rows_[r].step;
    const std::uint64_t key = due || shared ? seeds.next() : 0;
    if (!due) continue;
    keys_.push_back(key);
    due_steps_[due_.size()] = rows_[r].step;
    std::copy_n(states_.data() + r * width, width, due_states_.data() + due_.size() * width);
    due_.push_back(r);
  }
  if (due_.empty()) {
    seeds_ = seeds;
    return;
  }
  const ActingBatch batch{static_cast<std::ptrdiff_t>(due_.size()), due_states_.data(), due_steps_.data(), nullptr,
                          keys_.data()};
  llmdpd::act(*prompt_, *weights_.sampler, weights_.actor.get(), batch, 1, sampled_.data());
  for (std::size_t i = 0; i < due_.size() * numbers; ++i) {
    if (!std::isfinite(sampled_[i])) throw Failure(LLMDPD_NUMBER, "NaN or Inf in the action");
  }
  seeds_ = seeds;
  for (std::size_t i = 0; i < due_.size(); ++i) {
    Row& row = rows_[due_[i]];
    std::copy_n(sampled_.data() + i * numbers, numbers, chunks_.data() + due_[i] * numbers);
    row.chunk_step = row.step;
    row.chunk_used = 0;
  }
}

// The tracker's action, or the next one of the row's chunk, in the environment's own numbers; the clocks go on.
void Exported::take(std::size_t rows, float* actions) {
  const std::size_t width = weights_.action_dim, observed = weights_.observed_dim;
  const std::size_t state_width = observed + weights_.remembered.size();
  for (std::size_t r = 0; r < rows; ++r) {
    Row& row = rows_[r];
    const float* from = chunks_.data() + (r * weights_.chunk + row.chunk_used) * width;
    float* to = actions + r * width;
    row.course = row.going;
    if (row.late) {  // its chunk, and what was seen last, stay the policy's
      std::copy_n(tracked_.data() + r * width, width, to);
      ++row.step;
      continue;
    }
    for (std::size_t i = 0; i < width; ++i) {
      if (weights_.centre.empty()) {
        to[i] = from[i];
      } else {
        const float scaled = static_cast<float>(weights_.centre[i] + weights_.half[i] * from[i]);
        to[i] = std::min(std::max(scaled, weights_.low[i]), weights_.high[i]);
      }
    }
    if (!seen_.empty()) std::copy_n(states_.data() + r * state_width, observed, seen_.data() + r * observed);
    row.seen_step = ++row.step;
    row.chunk_step = ++row.chunk_used < weights_.horizon ? row.step : -1;
  }
}

}  // namespace llmdpd
