// A control loop at 500 Hz: example POLICY PROMPT [SECONDS]. Replace `observe` and `execute` by your robot's.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "llmdpd_policy.h"

namespace {

void observe(std::vector<float>& observation) {
  for (float& number : observation) number = 0.1f;
}

void execute(const std::vector<float>& action) { (void)action; }

int failed() {
  std::fprintf(stderr, "%s\n", llmdpd_message());
  return 1;
}

}  // namespace

int main(int count, char** words) {
  using Clock = std::chrono::steady_clock;
  if (count < 3) {
    std::fprintf(stderr, "usage: %s POLICY PROMPT [SECONDS]\n", words[0]);
    return 2;
  }
  llmdpd_policy* policy = nullptr;
  if (llmdpd_create(words[1], &policy)) return failed();
  if (llmdpd_set_prompt(policy, words[2])) return failed();
  std::vector<float> observation(llmdpd_observation_size(policy)), action(llmdpd_action_size(policy));

  constexpr std::chrono::microseconds kPeriod{2000};
  const int steps = static_cast<int>(500 * (count > 3 ? std::atof(words[3]) : 1.0));
  // Once before the loop: the first call reserves memory.
  observe(observation);
  if (llmdpd_act(policy, observation.data(), 1, action.data())) return failed();
  llmdpd_reset(policy);
  std::chrono::nanoseconds total{0}, longest{0};
  int late = 0;
  auto next = Clock::now();
  for (int step = 0; step < steps; ++step) {
    // Your robot begins an episode when its task does. Here nothing moves, which a tracker would take over from.
    if (step % 30 == 0) llmdpd_reset(policy);
    const auto before = Clock::now();
    observe(observation);
    if (llmdpd_act(policy, observation.data(), 1, action.data())) return failed();
    execute(action);
    const auto after = Clock::now();
    total += after - before;
    if (after - before > longest) longest = after - before;
    next += kPeriod;
    if (after > next) ++late;
    std::this_thread::sleep_until(next);
  }
  std::printf("%d steps at 500 Hz on %s: %.1f us an action, %.1f at most; %d late; last action", steps,
              llmdpd_instruction_set(), steps ? total.count() / 1e3 / steps : 0.0, longest.count() / 1e3, late);
  for (const float number : action) std::printf(" %.4f", number);
  std::printf("\n");
  llmdpd_destroy(policy);
  return 0;
}
