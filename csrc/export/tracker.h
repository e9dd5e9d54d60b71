// Handing over to the tracker of a demonstration: llmdpd/policy/takeover.py and llmdpd/policy/tracker.py, operation by
// operation in float32. Sums over coordinates or gripper readings, of which numpy and its BLAS choose the order, and
// products that a compiler fuses with sums, may be rounded otherwise.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace llmdpd {

using Place = std::array<float, 3>;  // of a point, of which the first D = 2 or 3 coordinates are used

// What is read of observations [S] and written into actions [A].
struct Scene {
  int dims = 0;                         // D; 0: the policy never hands over
  std::vector<int> body, object, goal;  // [D] each, columns of an observation
  std::vector<int> gripper;             // [G], columns of an observation
  std::vector<int> move, grip;          // [D], and any number, of an action's numbers
  std::vector<float> low, high;         // [A], bounds of actions
  double metres = 1, after = 0;         // of one unit; lengths after which it hands over at the latest
};

// A demonstration of T steps.
struct Track {
  int steps = 0;                              // T
  std::vector<float> body, object, held;      // [T, D]: after each step; at it; the object less the body
  std::vector<float> to_goal, actions, open;  // [T], [T, A], [T, G]
  std::vector<float> goal, opening;           // [D]; [G], what the readings differ by at most
  bool has_object = false;                    // whether there is one in every step; what is absent is all zeros
  float gain = 0;                             // action for each unit of way that is left
};

// An episode under way, and how far it has been tracked.
struct Course {
  std::int64_t last = -1, since = 0;     // the last time step, and that from which on the body stands; -1: not begun
  Place place{};                         // where it stands
  Place start_object{}, start_goal{};    // in the first observation
  Place by_object{}, by_goal{};          // how far they lie from where they were in the track
  int track = -1, step = 0, waited = 0;  // -1: the policy acts
  bool has_object = false, has_goal = false;
};

class Takeover {
 public:
  // The scene must outlive this.
  Takeover(const Scene& scene, std::vector<Track> tracks);
  // Whether the tracker acts at a time step, in the state `now`. To be called once at every time step.
  bool late(Course& course, std::int64_t step, const float* now) const;
  // The action [A] of a course that is late.
  void act(Course& course, const float* now, float* action) const;

 private:
  Place at(const std::vector<int>& columns, const float* now) const;
  void join(Course& course, const float* now) const;
  float share(const Course& course, int step) const;
  double unlike(const Course& course, int step, const float* now) const;
  Place way(const Course& course, const float* now) const;
  void command(const Course& course, const Place& way, float* action) const;

  const Scene& scene_;
  std::vector<Track> tracks_;  // those in which the body moves
  double earliest_, latest_, within_;
  std::int64_t still_;  // steps
  float near_, metres_;
};

}  // namespace llmdpd
