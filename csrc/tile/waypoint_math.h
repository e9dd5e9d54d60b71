// What the retrieval of waypoints is made of, with gradients and without.
#pragma once

#include "layer_math.h"

namespace {

constexpr float kNearness = 6.0f;  // factor on how far the state is from the demonstration, before tanh

// Moments compared by `compared` numbers each: those of the demonstration [compared, steps_padded], and the weights of
// their squared differences from a state's, [heads, compared].
struct Moments {
  const float *there, *similarity;
  int heads, compared;
  std::ptrdiff_t steps_padded;
};

// From the scores of one state's heads [heads, steps_padded], what their differences take away. As differences:
// multiplied out, their terms would be far greater than their sum.
inline void subtract_differences(const Moments& moments, const float* here, float* scores) {
  constexpr int kHeads = 4;  // at once
  for (int head = 0; head < moments.heads; head += kHeads) {
    const int count = moments.heads - head < kHeads ? moments.heads - head : kHeads;
    for (std::ptrdiff_t t = 0; t < moments.steps_padded; t += kWidth) {
      Vec away[kHeads] = {};
      for (int i = 0; i < moments.compared; ++i) {
        const Vec difference = broadcast(here[i]) - load(moments.there + i * moments.steps_padded + t);
        const Vec square = difference * difference;
        for (int h = 0; h < count; ++h) {
          away[h] = fma(square, broadcast(moments.similarity[(head + h) * moments.compared + i]), away[h]);
        }
      }
      for (int h = 0; h < count; ++h) {
        float* at = scores + (head + h) * moments.steps_padded + t;
        store(at, load(at) - away[h]);
      }
    }
  }
}

// How near a state is to what was demonstrated: tanh of `count` differences, in units of a factor.
inline float* write_nearness(const float* away, int count, float* to) {
  for (int i = 0; i < count; i += kWidth) {
    float bent[kWidth];
    const int some = count - i < kWidth ? count - i : kWidth;
    for (int j = 0; j < kWidth; ++j) bent[j] = j < some ? away[i + j] : 0.0f;
    store(bent, hyperbolic_tangent(broadcast(kNearness) * load(bent)));
    for (int j = 0; j < some; ++j) *to++ = bent[j];
  }
  return to;
}

// What one head found of the raw demonstration, `found` [A + L G], how far the state is from it, plain and through
// tanh: A + 2 L G numbers. `nothing` is the head's weight on the step that says nothing.
inline float* write_found(float* found, int action_dim, int lookaheads, int geometry, const float* here, float nothing,
                          float* to) {
  const int far = lookaheads * geometry;
  // Weighted like the sum that it is taken from: the step that says nothing is at no distance.
  const float seen = 1.0f - nothing;
  for (int i = 0; i < far; ++i) found[action_dim + i] -= seen * here[i % geometry];
  for (int i = 0; i < action_dim + far; ++i) *to++ = found[i];
  return write_nearness(found + action_dim, far, to);
}

}  // namespace
