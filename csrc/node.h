// What the nodes of training (reading.h, noise_node.h) are made of: weights in their order, and calls of layers that
// keep in one tape what their passes backward read.
#pragma once

#include <stdexcept>
#include <vector>

#include "layers.h"
#include "memory.h"
#include "thread_pool.h"

namespace llmdpd {

// A tensor as torch keeps it, contiguous: [rows, columns], or a vector [rows] with columns 0.
struct Weight {
  const float* data;
  int rows, columns;
};

// A linear layer, and where its gradients lie in the stretch of all: the weight's, then the bias's.
struct LinearWeights {
  Linear layer;
  std::ptrdiff_t at;

  int outputs() const { return layer.weight.outputs; }
  int inputs() const { return layer.weight.inputs; }
  LinearTarget target(float* gradients) const {
    return {gradients + at, gradients + at + static_cast<std::ptrdiff_t>(outputs()) * inputs()};
  }
};
struct NormWeights {
  Norm norm;
  int width;
  std::ptrdiff_t at;

  NormTarget target(float* gradients) const { return {gradients + at, gradients + at + width}; }
};
struct PlainWeights {
  const float* data;
  int rows, columns;
  std::ptrdiff_t at;
};

// Takes weights in the order in which they were given; their gradients follow each other in the same order.
class WeightsInOrder {
 public:
  explicit WeightsInOrder(const std::vector<Weight>& all) : all_(all) {}

  // Throws std::invalid_argument where there is none left, or one of another shape. -1: any size, from 1.
  PlainWeights plain(int rows, int columns, const char* name);
  LinearWeights linear(int outputs, int inputs, const char* name);
  NormWeights norm(int width, const char* name);
  // Throws where one is left.
  void end() const;
  std::ptrdiff_t numbers() const { return at_; }

 private:
  const std::vector<Weight>& all_;
  std::size_t next_ = 0;
  std::ptrdiff_t at_ = 0;
};

// Linear layers on rows that may be normalised first; what is behind is in the tape.
class LinearPass {
 public:
  void plan(const float* x, std::ptrdiff_t rows, int inputs, const NormWeights* norm, std::vector<Linear> layers,
            const LayerTools& tools, Allocator& tape);
  void forward(const std::vector<float*>& out, const LayerTools& tools) { linear_forward(in_, out, tape_, tools); }
  // d_x: [rows, inputs], or null where there is no norm and it is not asked for.
  void backward(const std::vector<const float*>& d_out, float* d_x, NormTarget norm,
                const std::vector<LinearTarget>& targets, const LayerTools& tools) const {
    linear_backward(in_, d_out, tape_, d_x, norm, targets, tools);
  }

 private:
  LinearInputs in_{};
  float* tape_ = nullptr;
};

class AttentionPass {
 public:
  void plan(const AttentionInputs& in, const LayerTools& tools, Allocator& tape);
  void forward(float* out, const LayerTools& tools) const { attention_forward(in_, out, tape_, tools); }
  void backward(const float* d_out, const AttentionTargets& targets, const LayerTools& tools) const {
    attention_backward(in_, d_out, tape_, targets, tools);
  }

 private:
  AttentionInputs in_{};
  float* tape_ = nullptr;
};

// Linear layers one after the other, ReLU between them.
class MlpPass {
 public:
  void plan(const float* x, std::ptrdiff_t rows, const std::vector<LinearWeights>& layers, const LayerTools& tools,
            Allocator& tape);
  // Its results, in the tape.
  const float* forward(const LayerTools& tools);
  // Overwrites d_out. d_x: as of `LinearPass`.
  void backward(float* d_out, float* d_x, float* gradients, const LayerTools& tools) const;

 private:
  std::ptrdiff_t rows_ = 0;
  std::vector<LinearWeights> layers_;
  std::vector<LinearPass> passes_;
  std::vector<float*> out_;
};

// Calls body(first, last) for parts of the rows, on several threads.
template <class Body>
void for_rows(std::ptrdiff_t rows, const LayerTools& tools, const Body& body) {
  constexpr std::ptrdiff_t kPart = 64;
  parallel_for(static_cast<int>((rows + kPart - 1) / kPart), tools.threads, [&](int part) {
    const std::ptrdiff_t first = part * kPart;
    body(first, first + kPart < rows ? first + kPart : rows);
  });
}

// Columns of a matrix: `width` numbers a row, `stride` from one to the next.
struct Columns {
  float* data;
  std::ptrdiff_t stride;
};
struct ConstColumns {
  const float* data;
  std::ptrdiff_t stride;
};
void copy_columns(ConstColumns from, Columns to, std::ptrdiff_t rows, int width, const LayerTools& tools);
void add_columns(ConstColumns from, Columns to, std::ptrdiff_t rows, int width, const LayerTools& tools);

}  // namespace llmdpd
