// A pool of threads that sleep between calls.
#pragma once

#include <functional>

namespace llmdpd {

// Calls body(0) … body(tasks - 1), each once, on the calling thread and up to `threads` - 1 others, and returns when all
// are done. Which thread runs a task is open. Where the pool already works for another caller, this one works alone.
// The first exception of a task is thrown here.
void parallel_for(int tasks, int threads, const std::function<void(int)>& body);

}  // namespace llmdpd
