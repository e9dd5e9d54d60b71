#include "thread_pool.h"

#ifndef _WIN32
#include <pthread.h>
#include <signal.h>
#endif
#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

namespace llmdpd {
namespace {

using Clock = std::chrono::steady_clock;

// Waking a thread costs 25 to 50 µs on an idle core of a virtual machine, and a training iteration calls with pauses of
// about 100 µs. So a worker watches for the next call for a while before it sleeps: 200 µs of work, on two threads and
// with such pauses, then takes 102 µs in place of 150. But only while calls come that soon: after kPatience longer
// pauses in a row it sleeps at once. And not on the caller's core, where on a busy machine the scheduler may put it:
// there it would be in the way of what it waits for (measured: 200 µs became 400).
constexpr std::chrono::microseconds kWorkerSpin{200};
constexpr int kPatience = 4;
// The caller waits for tasks that others began about when it began its own last one. No longer: where one of them lost
// its core to another process or to a spinning thread of torch's pool, sleeping gives it the caller's. Nobody yields
// while it spins: that hands a whole time slice, 4 ms, to the thread that takes the core.
constexpr std::chrono::microseconds kCallerSpin{20};

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The core that this thread is on, or -1.
inline int core() {
#ifdef __linux__
  return sched_getcpu();
#else
  return -1;
#endif
}

// Whether `condition` came true within the limit, and before `give_up` did.
template <typename Condition, typename GiveUp>
bool spin(std::chrono::microseconds limit, const Condition& condition, const GiveUp& give_up) {
  if (condition()) return true;
  const Clock::time_point end = Clock::now() + limit;
  while (!give_up() && Clock::now() < end) {
    for (int i = 0; i < 16; ++i) {
      relax();
      if (condition()) return true;
    }
  }
  return false;
}

// What is open in the current run, in one word, so that it is taken in one step: how many tasks, how many places for
// workers (a run may have fewer threads than the pool), and which run it is, so that who has a place in one run cannot
// take tasks of the next.
constexpr std::uint64_t kTask = 1, kPlace = std::uint64_t{1} << 32, kRun = std::uint64_t{1} << 48;
constexpr int kMaxThreads = 1024;
constexpr std::uint64_t tasks_of(std::uint64_t word) { return word & (kPlace - 1); }
constexpr std::uint64_t places_of(std::uint64_t word) { return (word & (kRun - 1)) / kPlace; }
constexpr std::uint64_t run_of(std::uint64_t word) { return word / kRun; }

// While it lives, this thread hears no signal, and threads that it starts inherit that: one that the program's own
// threads hold off must not be delivered to a worker. Windows delivers none to threads.
class SignalsHeldOff {
 public:
#ifdef _WIN32
  SignalsHeldOff() {}
  ~SignalsHeldOff() {}
#else
  SignalsHeldOff() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsHeldOff() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
#endif
};

class ThreadPool {
 public:
  // False, and nothing done, where it works for another caller.
  bool run(int tasks, int threads, const std::function<void(int)>& body) {
    if (taken_.exchange(true, std::memory_order_acquire)) return false;
    const Release release{taken_};
    const int helpers = hire(std::min({threads, tasks, kMaxThreads}) - 1);
    body_ = &body;
    tasks_ = tasks;
    failed_.store(false, std::memory_order_relaxed);
    error_ = nullptr;
    unfinished_.store(tasks, std::memory_order_relaxed);
    caller_core_.store(core(), std::memory_order_relaxed);
    work(publish(tasks, helpers), 0);
    const auto finished = [this] { return unfinished_.load(std::memory_order_acquire) == 0; };
    if (!spin(kCallerSpin, finished, [] { return false; })) {
      std::unique_lock<std::mutex> lock(mutex_);
      done_.wait(lock, finished);
    }
    if (error_) std::rethrow_exception(error_);
    return true;
  }

 private:
  struct Release {
    std::atomic<bool>& taken;
    ~Release() { taken.store(false, std::memory_order_release); }
  };

  // How many workers there are, at most `wanted`; missing ones are started.
  int hire(int wanted) {
    if (workers_ >= wanted) return wanted;
    const SignalsHeldOff held_off;
    try {
      for (; workers_ < wanted; ++workers_) std::thread([this] { work_forever(); }).detach();
    } catch (const std::system_error&) {
      // No thread left for this process: those that it has do the work.
    }
    return std::min(workers_, wanted);
  }

  // Opens the run, whose fields are set, and wakes as many workers as it needs beside those that are awake.
  std::uint64_t publish(int tasks, int helpers) {
    const std::uint64_t last = run_of(open_.load(std::memory_order_relaxed));
    const std::uint64_t word = (last + 1) * kRun + static_cast<std::uint64_t>(helpers) * kPlace + tasks * kTask;
    int sleepy;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      open_.store(word, std::memory_order_release);
      sleepy = helpers - (workers_ - sleepers_);
    }
    for (; sleepy > 0; --sleepy) wake_.notify_one();
    return word;
  }

  // Does tasks of the run that `word` is of, as long as there are any. The first one is taken together with `place`.
  // Only who has taken a task reads the run's fields: its caller waits for that task, so they stay until it is done,
  // while somebody who comes late finds nothing to take and has touched nothing.
  void work(std::uint64_t word, std::uint64_t place) {
    const std::uint64_t run = run_of(word);
    while (run_of(word) == run && tasks_of(word) > 0 && (place == 0 || places_of(word) > 0)) {
      if (!open_.compare_exchange_weak(word, word - kTask - place, std::memory_order_acquire,
                                       std::memory_order_relaxed)) {
        continue;
      }
      perform(tasks_ - static_cast<int>(tasks_of(word)));
      place = 0;
      word = open_.load(std::memory_order_relaxed);
    }
  }

  void perform(int task) {
    try {
      if (!failed_.load(std::memory_order_relaxed)) (*body_)(task);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
      failed_.store(true, std::memory_order_relaxed);
    }
    if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
      std::lock_guard<std::mutex> lock(mutex_);  // or the caller could look before this and sleep after it
      done_.notify_one();
    }
  }

  bool joinable() const {
    const std::uint64_t word = open_.load(std::memory_order_relaxed);
    return tasks_of(word) > 0 && places_of(word) > 0;
  }

  void work_forever() {
    for (int patience = kPatience;;) {
      const Clock::time_point idle_since = Clock::now();
      const auto in_the_way = [this] { return core() == caller_core_.load(std::memory_order_relaxed); };
      if (patience == 0 || !spin(kWorkerSpin, [this] { return joinable(); }, in_the_way)) {
        std::unique_lock<std::mutex> lock(mutex_);
        ++sleepers_;
        wake_.wait(lock, [this] { return joinable(); });
        --sleepers_;
      }
      const bool soon = Clock::now() - idle_since <= kWorkerSpin;
      patience = soon ? kPatience : std::max(patience - 1, 0);
      work(open_.load(std::memory_order_relaxed), kPlace);
    }
  }

  std::atomic<bool> taken_{false};  // by the caller of a run, which alone writes the run's fields
  int workers_ = 0;
  std::atomic<std::uint64_t> open_{0};
  std::atomic<int> caller_core_{-1};

  const std::function<void(int)>* body_ = nullptr;
  int tasks_ = 0;
  std::atomic<int> unfinished_{0};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;  // written under the mutex, read when nothing is unfinished

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  int sleepers_ = 0;  // under the mutex
};

// Never destroyed: its threads sleep on it until the process ends. A forked child has none of them, so it starts anew;
// what the parent's pool was doing at that moment, under which lock, is nothing to the child.
std::atomic<ThreadPool*> pool{nullptr};
#ifndef _WIN32
[[maybe_unused]] const int atfork_error = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
#endif

ThreadPool& the_pool() {
  ThreadPool* existing = pool.load();
  if (existing) return *existing;
  auto* created = new ThreadPool;
  if (pool.compare_exchange_strong(existing, created)) return *created;
  delete created;
  return *existing;
}

}  // namespace

void parallel_for_any(int tasks, int threads, const std::function<void(int)>& body) {
  if (tasks > 1 && threads > 1 && the_pool().run(tasks, threads, body)) return;
  for (int i = 0; i < tasks; ++i) body(i);
}

}  // namespace llmdpd
