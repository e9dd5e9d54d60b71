// A pool of threads that sleep between calls, and stay awake for a moment where calls follow each other closely.
#pragma once

#include <functional>

namespace llmdpd {

// Calls body(0) … body(tasks - 1), each once, on the calling thread and up to `threads` - 1 others, and returns when
// all are done. Which thread does a task, and in which order, is open. Where the pool already works for another caller,
// or for this one further up (a task that calls parallel_for), the calling thread works alone, and so it does where the
// system has no thread left. The first exception of a task is thrown here, when the tasks that had begun are done;
// those that had not are left out.
void parallel_for_any(int tasks, int threads, const std::function<void(int)>& body);

template <class Body>
void parallel_for(int tasks, int threads, const Body& body) {
  parallel_for_any(tasks, threads, std::cref(body));  // by reference: a copy would be on the heap
}

}  // namespace llmdpd
