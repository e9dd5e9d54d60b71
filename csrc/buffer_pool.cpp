#include "buffer_pool.h"

#include <algorithm>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

namespace llmdpd {
namespace {

constexpr std::align_val_t kAlignment{64};
constexpr std::size_t kKeptFloats = std::size_t{64} << 20;  // 256 MB of buffers that nobody uses at the moment
constexpr std::size_t kKeptBuffers = 16;

struct Buffer {
  float* memory;
  std::size_t floats;
};

class BufferPool {
 public:
  float* acquire(std::size_t floats) {
    const std::lock_guard<std::mutex> lock(mutex_);
    // The smallest that is large enough, if it is not more than twice as large.
    auto best = free_.end();
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      if (it->floats >= floats && it->floats / 2 <= floats && (best == free_.end() || it->floats < best->floats))
        best = it;
    }
    Buffer found{};
    if (best != free_.end()) {
      found = *best;
      free_.erase(best);
    } else {
      found = {static_cast<float*>(::operator new(floats * sizeof(float), kAlignment)), floats};
    }
    used_.emplace(found.memory, found.floats);
    return found.memory;
  }

  void release(float* memory) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto used = used_.find(memory);
    free_.push_back({memory, used->second});
    used_.erase(used);
    // The oldest go first: those sizes are the least likely to be asked for again.
    std::size_t kept = 0;
    for (const Buffer& buffer : free_) kept += buffer.floats;
    while (!free_.empty() && (kept > kKeptFloats || free_.size() > kKeptBuffers)) {
      kept -= free_.front().floats;
      ::operator delete(free_.front().memory, kAlignment);
      free_.erase(free_.begin());
    }
  }

 private:
  std::mutex mutex_;
  std::vector<Buffer> free_;
  std::unordered_map<float*, std::size_t> used_;
};

// Never destroyed: tensors may outlive every other static object.
BufferPool& pool() {
  static auto* const created = new BufferPool;
  return *created;
}

}  // namespace

float* acquire_buffer(std::size_t floats) { return pool().acquire(std::max<std::size_t>(floats, 1)); }
void release_buffer(float* buffer) { pool().release(buffer); }

}  // namespace llmdpd
