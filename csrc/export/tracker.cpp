#include "tracker.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <utility>

namespace llmdpd {
namespace {

// As they are named in Python.
constexpr double kEarliest = 0.5;  // lengths of the demonstration
constexpr std::int64_t kStill = 30;  // steps, at least
constexpr double kWithin = 0.02, kReached = 0.02;  // metres
constexpr int kTimeout = 10;
constexpr float kOnTheWay = 0.05f, kHeld = 0.03f, kSquareOpen = static_cast<float>(0.2 * 0.2);

// In steps; of none it is infinite.
double longest(const std::vector<Track>& tracks) {
  int steps = 0;
  for (const Track& track : tracks) steps = std::max(steps, track.steps);
  return steps ? steps : std::numeric_limits<double>::infinity();
}

std::vector<Track> moving(std::vector<Track> tracks) {
  const auto stands = [](const Track& track) { return !(track.gain > 0); };
  tracks.erase(std::remove_if(tracks.begin(), tracks.end(), stands), tracks.end());
  return tracks;
}

double distance(float one, float other) { return std::abs(static_cast<double>(one) - other); }

// The most steps for which the body stays within a distance, along each axis, of where it was.
int longest_stand(const Track& track, int dims, double within) {
  int since = 0, longest = 0;
  for (int step = 0; step < track.steps; ++step) {
    const float* now = track.body.data() + static_cast<std::size_t>(step) * dims;
    const float* then = track.body.data() + static_cast<std::size_t>(since) * dims;
    bool moved = false;
    for (int d = 0; d < dims; ++d) moved |= distance(now[d], then[d]) > within;
    if (moved) since = step;
    longest = std::max(longest, step - since);
  }
  return longest;
}

bool any(const float* numbers, int count) {
  return std::any_of(numbers, numbers + count, [](float number) { return number != 0.0f; });
}

}  // namespace

Takeover::Takeover(const Scene& scene, std::vector<Track> tracks)
    : scene_(scene),
      tracks_(moving(std::move(tracks))),
      earliest_(std::min(kEarliest, scene.after) * longest(tracks_)),
      latest_(std::max(scene.after * longest(tracks_), static_cast<double>(kStill))),
      within_(kWithin / scene.metres),
      near_(static_cast<float>(kReached / scene.metres)),
      metres_(static_cast<float>(scene.metres)) {
  int stand = 0;
  for (const Track& track : tracks_) stand = std::max(stand, longest_stand(track, scene.dims, within_));
  still_ = std::max<std::int64_t>(kStill, stand + stand / 2);
}

bool Takeover::late(Course& course, std::int64_t step, const float* now) const {
  const Place place = at(scene_.body, now);
  bool moved = false;
  for (int d = 0; d < scene_.dims; ++d) moved |= distance(place[d], course.place[d]) > within_;
  if (course.last < 0 || step < course.last || step == 0) {
    course = Course{};
    course.start_object = at(scene_.object, now);
    course.start_goal = at(scene_.goal, now);
    moved = true;
  }
  if (moved) {
    course.place = place;
    course.since = step;
  }
  course.last = step;
  const auto time = static_cast<double>(step);
  return course.track >= 0 || time >= latest_ || (time >= earliest_ && step - course.since >= still_);
}

void Takeover::act(Course& course, const float* now, float* action) const {
  if (course.track < 0) join(course, now);
  const Track& track = tracks_[course.track];
  if (course.has_object && share(course, course.step) == 0.0f) {  // it may have been pushed
    const Place object = at(scene_.object, now);
    const float* shown = track.object.data() + static_cast<std::size_t>(course.step) * scene_.dims;
    for (int d = 0; d < scene_.dims; ++d) course.by_object[d] = object[d] - shown[d];
  }
  Place left = way(course, now);
  ++course.waited;
  double square = 0.0;  // of products in float32, as BLAS adds them
  for (int d = 0; d < scene_.dims; ++d) square += left[d] * left[d];
  const bool reached = std::sqrt(static_cast<float>(square)) < near_;
  if (course.step < track.steps - 1 && (reached || course.waited >= kTimeout)) {
    ++course.step;
    course.waited = 0;
    left = way(course, now);
  }
  command(course, left, action);
}

Place Takeover::at(const std::vector<int>& columns, const float* now) const {
  Place place{};
  for (int d = 0; d < scene_.dims; ++d) place[d] = now[columns[d]];
  return place;
}

// Follows the track that is most like the state, from that moment on. Of equally like moments it is the last, of tracks
// the first.
void Takeover::join(Course& course, const float* now) const {
  Course nearest = course;
  double least = std::numeric_limits<double>::infinity();
  for (std::size_t k = 0; k < tracks_.size(); ++k) {
    const Track& track = tracks_[k];
    Course joined = course;
    joined.has_object = track.has_object && any(course.start_object.data(), scene_.dims);
    joined.has_goal = any(track.goal.data(), scene_.dims) && any(course.start_goal.data(), scene_.dims);
    // What is absent has no place: without a goal its place moves with the object's first one.
    for (int d = 0; d < scene_.dims; ++d) {
      joined.by_object[d] = joined.has_object ? course.start_object[d] - track.object[d] : 0.0f;
      joined.by_goal[d] = joined.has_goal ? course.start_goal[d] - track.goal[d] : joined.by_object[d];
    }
    joined.track = static_cast<int>(k);
    joined.step = track.steps - 1;
    joined.waited = 0;
    double own = std::numeric_limits<double>::infinity();
    for (int step = 0; step < track.steps; ++step) {
      const double here = unlike(joined, step, now);
      if (here <= own) {
        own = here;
        joined.step = step;
      }
    }
    if (k == 0 || own < least) {
      least = own;
      nearest = joined;
    }
  }
  course = nearest;
}

// How far the frame has shifted from the object to the goal at a step of the course's track.
float Takeover::share(const Course& course, int step) const {
  if (course.has_object) return tracks_[course.track].to_goal[step];
  return course.has_goal ? 1.0f : 0.0f;
}

// How unlike the state is to a step of the course's track.
double Takeover::unlike(const Course& course, int step, const float* now) const {
  const Track& track = tracks_[course.track];
  const Place body = at(scene_.body, now), object = at(scene_.object, now);
  const float to_goal = share(course, step);
  const std::size_t place = static_cast<std::size_t>(step) * scene_.dims;
  float apart = 0.0f, otherwise = 0.0f;
  for (int d = 0; d < scene_.dims; ++d) {
    const bool pushed = course.has_object && to_goal == 0.0f;
    const float by_object = pushed ? object[d] - track.object[place + d] : course.by_object[d];
    const float waypoint = track.body[place + d] + (1.0f - to_goal) * by_object + to_goal * course.by_goal[d];
    const float away = (waypoint - body[d]) * metres_ / kOnTheWay;
    const float held = (track.held[place + d] - (object[d] - body[d])) * metres_ / kHeld;
    apart += away * away;
    otherwise += held * held;
  }
  const std::size_t readings = scene_.gripper.size();
  float opened = 0.0f;
  for (std::size_t g = 0; g < readings; ++g) {
    const float shown = track.open[static_cast<std::size_t>(step) * readings + g];
    const float opening = std::min(std::abs(shown - now[scene_.gripper[g]]) / track.opening[g], 1.0f);
    opened += opening * opening;
  }
  const double held = course.has_object ? otherwise : 0.0f;
  return held + static_cast<double>(apart) + static_cast<double>(opened / kSquareOpen);
}

// From the body to the waypoint.
Place Takeover::way(const Course& course, const float* now) const {
  const Track& track = tracks_[course.track];
  const float to_goal = share(course, course.step);
  const float* shown = track.body.data() + static_cast<std::size_t>(course.step) * scene_.dims;
  Place found{};
  for (int d = 0; d < scene_.dims; ++d) {
    const float waypoint = shown[d] + (1.0f - to_goal) * course.by_object[d] + to_goal * course.by_goal[d];
    found[d] = waypoint - now[scene_.body[d]];
  }
  return found;
}

// The gripper's command is what was shown; what else was shown is done but once.
void Takeover::command(const Course& course, const Place& way, float* action) const {
  const Track& track = tracks_[course.track];
  const std::size_t width = scene_.low.size();
  const float* shown = track.actions.data() + static_cast<std::size_t>(course.step) * width;
  const bool again = course.waited > 1;
  for (std::size_t i = 0; i < width; ++i) action[i] = again ? 0.0f : shown[i];
  for (const int i : scene_.grip) action[i] = shown[i];
  for (int d = 0; d < scene_.dims; ++d) action[scene_.move[d]] = track.gain * way[d];
  for (std::size_t i = 0; i < width; ++i) action[i] = std::min(std::max(action[i], scene_.low[i]), scene_.high[i]);
}

}  // namespace llmdpd
