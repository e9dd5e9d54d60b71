#include "buffer_pool.h"

#include <algorithm>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "memory.h"

namespace llmdpd {
namespace {

constexpr std::size_t kKeptFloats = std::size_t{64} << 20;  // 256 MB of buffers that nobody uses at the moment
constexpr std::size_t kKeptBuffers = 16;

class BufferPool {
 public:
  float* acquire(std::size_t floats) {
    const std::lock_guard<std::mutex> lock(mutex_);
    // The smallest that is large enough, if it is not more than twice as large.
    auto best = free_.end();
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      if (it->floats() >= floats && it->floats() / 2 <= floats && (best == free_.end() || it->floats() < best->floats()))
        best = it;
    }
    Block found;
    if (best != free_.end()) {
      found = std::move(*best);
      free_.erase(best);
    } else {
      found = Block(floats);
    }
    float* memory = found.get();
    used_.emplace(memory, std::move(found));
    return memory;
  }

  void release(float* memory) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto used = used_.find(memory);
    free_.push_back(std::move(used->second));
    used_.erase(used);
    // The oldest go first: those sizes are the least likely to be asked for again.
    std::size_t kept = 0;
    for (const Block& block : free_) kept += block.floats();
    while (!free_.empty() && (kept > kKeptFloats || free_.size() > kKeptBuffers)) {
      kept -= free_.front().floats();
      free_.erase(free_.begin());
    }
  }

 private:
  std::mutex mutex_;
  std::vector<Block> free_;
  std::unordered_map<float*, Block> used_;
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
