// Aligned memory: reusable arenas, and an allocator that lays parts out in one block.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstddef>
#include <new>
#include <utility>

namespace llmdpd {

// Memory that is aligned to 64 bytes. Megabytes of it are whole pages of 2 MB, which Linux then gives where it has them:
// a pass over a batch touches thousands of the usual pages of 4 KB, more than the processor can find at once.
class Block {
 public:
  Block() = default;
  explicit Block(std::size_t floats) : floats_(floats) {
    std::size_t bytes = floats * sizeof(float);
    if (large(floats)) bytes = (bytes + kPage - 1) / kPage * kPage;
    memory_ = static_cast<float*>(::operator new(bytes, alignment(floats)));
#ifdef __linux__
    if (large(floats)) madvise(memory_, bytes, MADV_HUGEPAGE);  // where it can't, pages are the usual ones
#endif
  }
  Block(Block&& other) noexcept { swap(other); }
  Block& operator=(Block&& other) noexcept {
    Block(std::move(other)).swap(*this);
    return *this;
  }
  ~Block() {
    if (memory_) ::operator delete(memory_, alignment(floats_));
  }

  float* get() const { return memory_; }
  std::size_t floats() const { return floats_; }

 private:
  static constexpr std::size_t kPage = std::size_t{1} << 21;
  static bool large(std::size_t floats) { return floats * sizeof(float) >= kPage; }
  static std::align_val_t alignment(std::size_t floats) { return std::align_val_t{large(floats) ? kPage : 64}; }
  void swap(Block& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(floats_, other.floats_);
  }

  float* memory_ = nullptr;
  std::size_t floats_ = 0;
};

// Grows and is kept: fresh pages for each call's megabytes would cost more than what is computed in them.
class Arena {
 public:
  float* reserve(std::size_t floats) {
    if (floats > block_.floats()) {
      block_ = Block();
      block_ = Block(floats);
    }
    return block_.get();
  }

 private:
  Block block_;
};

// Hands out parts of one block. With a null base it only counts, and what it hands out is null.
class Allocator {
 public:
  explicit Allocator(float* base) : base_(base) {}
  bool counting() const { return !base_; }
  float* take(std::size_t floats) {
    float* part = base_ ? base_ + used_ : nullptr;
    used_ += (floats + 15) / 16 * 16;  // keeps every part aligned to 64 bytes
    return part;
  }
  std::size_t used() const { return used_; }

 private:
  float* base_;
  std::size_t used_ = 0;
};

// Calls layout(Allocator&) twice, to count and then to lay out in the arena's memory.
template <class Layout>
void lay_out(Arena& arena, const Layout& layout) {
  Allocator count(nullptr);
  layout(count);
  Allocator parts(arena.reserve(count.used()));
  layout(parts);
}

}  // namespace llmdpd
