#include "thread_pool.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

namespace llmdpd {
namespace {

class ThreadPool {
 public:
  void run(int tasks, int threads, const std::function<void(int)>& body) {
    std::unique_lock<std::mutex> caller(caller_, std::try_to_lock);
    if (threads <= 1 || tasks <= 1 || !caller.owns_lock()) {
      for (int i = 0; i < tasks; ++i) body(i);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (; workers_ < threads - 1; ++workers_) std::thread([this] { work_forever(); }).detach();
      body_ = &body;
      tasks_ = tasks;
      next_ = 0;
      error_ = nullptr;
      open_places_ = threads - 1;
    }
    wake_.notify_all();
    work();
    std::unique_lock<std::mutex> lock(mutex_);
    open_places_ = 0;
    done_.wait(lock, [this] { return busy_ == 0; });
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void work() {
    try {
      for (int i = next_++; i < tasks_; i = next_++) (*body_)(i);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
  }

  void work_forever() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return open_places_ > 0; });
      --open_places_;
      ++busy_;
      lock.unlock();
      work();
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex caller_;  // held through a run
  std::mutex mutex_;   // guards all below but next_
  std::condition_variable wake_, done_;
  int workers_ = 0;
  int open_places_ = 0;
  int busy_ = 0;
  const std::function<void(int)>* body_ = nullptr;
  int tasks_ = 0;
  std::atomic<int> next_{0};
  std::exception_ptr error_;
};

// Never destroyed: its threads sleep on it until the process ends. A forked child has none of them, so it starts anew.
std::atomic<ThreadPool*> pool{nullptr};

ThreadPool& the_pool() {
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { pool = nullptr; }); });
  ThreadPool* existing = pool;
  if (existing) return *existing;
  auto* created = new ThreadPool;
  if (pool.compare_exchange_strong(existing, created)) return *created;
  delete created;
  return *existing;
}

}  // namespace

void parallel_for(int tasks, int threads, const std::function<void(int)>& body) { the_pool().run(tasks, threads, body); }

}  // namespace llmdpd
