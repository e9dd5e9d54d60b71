#include "../thread_pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "check.h"

using llmdpd::parallel_for;

namespace {

// What the tasks write is not atomic on purpose: a run's end must order it before the caller's reads.
void every_task_once() {
  for (int threads : {1, 2, 3, 8}) {
    for (int tasks : {0, 1, 2, 3, 7, 100, 5000}) {
      std::vector<int> done(tasks, 0);
      parallel_for(tasks, threads, [&](int task) { ++done[task]; });
      for (int count : done) CHECK(count == 1);
    }
  }
}

// Runs of no work at all, so that workers wake for one while the next ones come and go; each with a body of its own on
// the caller's stack.
void close_runs() {
  for (int run = 0; run < 20000; ++run) {
    const int tasks = 2 + run % 5;
    std::vector<int> done(tasks, -1);
    parallel_for(tasks, 2 + run % 7, [&done, run](int task) { done[task] = run; });
    for (int value : done) CHECK(value == run);
    if (run % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // they sleep, too
  }
}

void no_more_threads_than_asked_for() {
  parallel_for(64, 8, [](int) { std::this_thread::sleep_for(std::chrono::microseconds(100)); });
  for (int threads : {2, 3}) {
    for (int run = 0; run < 50; ++run) {
      std::atomic<int> now{0};
      std::atomic<bool> exceeded{false};
      parallel_for(16, threads, [&](int) {
        if (++now > threads) exceeded = true;
        std::this_thread::sleep_for(std::chrono::microseconds(20));
        --now;
      });
      CHECK(!exceeded);
    }
  }
}

// Two tasks that wait for each other: with one thread they would never end.
void works_on_several_threads() {
  std::mutex mutex;
  std::set<std::thread::id> workers;
  std::atomic<int> arrived{0};
  parallel_for(2, 2, [&](int) {
    ++arrived;
    while (arrived < 2) std::this_thread::yield();
    std::lock_guard<std::mutex> lock(mutex);
    workers.insert(std::this_thread::get_id());
  });
  CHECK(workers.size() == 2);
}

void nested_calls_work_alone() {
  std::vector<std::vector<int>> done(8, std::vector<int>(8, 0));
  parallel_for(8, 4, [&](int outer) { parallel_for(8, 4, [&, outer](int inner) { ++done[outer][inner]; }); });
  for (const auto& row : done) CHECK(row == std::vector<int>(8, 1));
}

void callers_at_once() {
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([caller] {
      for (int run = 0; run < 2000; ++run) {
        std::vector<int> done(1 + (run + caller) % 9, 0);
        parallel_for(static_cast<int>(done.size()), 1 + run % 4, [&](int task) { done[task] += caller + 1; });
        for (int value : done) CHECK(value == caller + 1);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
}

void exceptions_reach_the_caller() {
  for (int threads : {1, 2, 4}) {
    for (int run = 0; run < 30; ++run) {
      std::atomic<int> begun{0};
      std::string message;
      try {
        parallel_for(5000, threads, [&](int) {
          const int now = ++begun;
          if (now == 10) throw std::runtime_error("the tenth");
          if (now > 10) std::this_thread::sleep_for(std::chrono::microseconds(50));
        });
      } catch (const std::runtime_error& error) {
        message = error.what();
      }
      CHECK(message == "the tenth");
      CHECK(begun >= 10 && begun < 5000);
      std::vector<int> done(20, 0);
      parallel_for(20, threads, [&](int task) { ++done[task]; });
      CHECK(done == std::vector<int>(20, 1));
    }
  }
  int caught = 0;
  for (int run = 0; run < 200; ++run) {
    try {
      parallel_for(4, 4, [](int task) { throw task; });
    } catch (int) {
      ++caught;
    }
  }
  CHECK(caught == 200);
}

// ThreadSanitizer doesn't follow threads into a forked child.
#ifndef __SANITIZE_THREAD__
void fork_while_another_thread_runs() {
  std::atomic<bool> stop{false};
  std::thread busy([&] {
    while (!stop) parallel_for(6, 3, [](int) {});
  });
  for (int i = 0; i < 50; ++i) {
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
      alarm(20);  // a child that hangs fails
      std::atomic<int> arrived{0};
      parallel_for(2, 2, [&](int) {
        ++arrived;
        while (arrived < 2) std::this_thread::yield();
      });
      _exit(0);
    }
    int status = 1;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
  }
  stop = true;
  busy.join();
}
#endif

}  // namespace

void test_thread_pool() {
  every_task_once();
  works_on_several_threads();
  close_runs();
  no_more_threads_than_asked_for();
  nested_calls_work_alone();
  callers_at_once();
  exceptions_reach_the_caller();
#ifndef __SANITIZE_THREAD__
  fork_while_another_thread_runs();
#endif
}
