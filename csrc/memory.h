// Aligned memory: reusable arenas, and an allocator that lays parts out in one block.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace llmdpd {

// Grows and is kept: fresh pages for each call's megabytes would cost more than what is computed in them.
class Arena {
 public:
  float* reserve(std::size_t floats) {
    if (floats > capacity_) {
      memory_.reset();
      capacity_ = 0;
      memory_.reset(static_cast<float*>(::operator new(floats * sizeof(float), kAlignment)));
      capacity_ = floats;
    }
    return memory_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(float* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<float, Free> memory_;
  std::size_t capacity_ = 0;
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
