#include "node.h"

#include <algorithm>
#include <string>

namespace llmdpd {

PlainWeights WeightsInOrder::plain(int rows, int columns, const char* name) {
  if (next_ == all_.size()) throw std::invalid_argument(std::string("missing weight: ") + name);
  const Weight& weight = all_[next_++];
  const bool fits = (rows < 0 ? weight.rows >= 1 : weight.rows == rows) &&
                    (columns < 0 ? weight.columns >= 1 : weight.columns == columns);
  if (!fits) throw std::invalid_argument(std::string("wrong shape: ") + name);
  const PlainWeights found{weight.data, weight.rows, weight.columns, at_};
  at_ += static_cast<std::ptrdiff_t>(weight.rows) * std::max(weight.columns, 1);
  return found;
}

LinearWeights WeightsInOrder::linear(int outputs, int inputs, const char* name) {
  const PlainWeights weight = plain(outputs, inputs, name), bias = plain(weight.rows, 0, name);
  return {{{weight.data, weight.columns, weight.rows, weight.columns}, bias.data}, weight.at};
}

NormWeights WeightsInOrder::norm(int width, const char* name) {
  const PlainWeights weight = plain(width, 0, name), bias = plain(weight.rows, 0, name);
  return {{weight.data, bias.data}, weight.rows, weight.at};
}

void WeightsInOrder::end() const {
  if (next_ != all_.size()) throw std::invalid_argument("wrong number: weights");
}

void LinearPass::plan(const float* x, std::ptrdiff_t rows, int inputs, const NormWeights* norm,
                      std::vector<Linear> layers, const LayerTools& tools, Allocator& tape) {
  in_ = {rows, inputs, x, norm ? norm->norm : Norm{nullptr, nullptr}, std::move(layers)};
  tape_ = tape.take(linear_tape_floats(rows, inputs, norm != nullptr, tools));
}

void AttentionPass::plan(const AttentionInputs& in, const LayerTools& tools, Allocator& tape) {
  in_ = in;
  tape_ = tape.take(attention_tape_floats(in, tools));
}

void MlpPass::plan(const float* x, std::ptrdiff_t rows, const std::vector<LinearWeights>& layers,
                   const LayerTools& tools, Allocator& tape) {
  rows_ = rows;
  layers_ = layers;
  passes_.resize(layers.size());
  out_.resize(layers.size());
  for (std::size_t i = 0; i < layers.size(); ++i) {
    passes_[i].plan(x, rows, layers[i].inputs(), nullptr, {layers[i].layer}, tools, tape);
    x = out_[i] = tape.take(rows * layers[i].outputs());
  }
}

const float* MlpPass::forward(const LayerTools& tools) {
  for (std::size_t i = 0; i < passes_.size(); ++i) {
    passes_[i].forward({out_[i]}, tools);
    if (i + 1 == passes_.size()) break;
    for (std::ptrdiff_t n = 0; n < rows_ * layers_[i].outputs(); ++n) out_[i][n] = std::max(out_[i][n], 0.0f);
  }
  return out_.back();
}

void MlpPass::backward(float* d_out, float* d_x, float* gradients, const LayerTools& tools) const {
  thread_local Arena arena;
  std::vector<float*> between(passes_.size());
  lay_out(arena, [&](Allocator& memory) {
    for (std::size_t i = 1; i < passes_.size(); ++i) between[i] = memory.take(rows_ * layers_[i].inputs());
  });
  between[0] = d_x;
  for (std::size_t i = passes_.size(); i-- > 0;) {
    if (i + 1 < passes_.size()) {
      for (std::ptrdiff_t n = 0; n < rows_ * layers_[i].outputs(); ++n) {
        if (out_[i][n] <= 0.0f) d_out[n] = 0.0f;
      }
    }
    passes_[i].backward({d_out}, between[i], {}, {layers_[i].target(gradients)}, tools);
    d_out = between[i];
  }
}

void copy_columns(ConstColumns from, Columns to, std::ptrdiff_t rows, int width, const LayerTools& tools) {
  for_rows(rows, tools, [&](std::ptrdiff_t first, std::ptrdiff_t last) {
    for (std::ptrdiff_t r = first; r < last; ++r) {
      std::copy_n(from.data + r * from.stride, width, to.data + r * to.stride);
    }
  });
}

void add_columns(ConstColumns from, Columns to, std::ptrdiff_t rows, int width, const LayerTools& tools) {
  for_rows(rows, tools, [&](std::ptrdiff_t first, std::ptrdiff_t last) {
    for (std::ptrdiff_t r = first; r < last; ++r) {
      for (int c = 0; c < width; ++c) to.data[r * to.stride + c] += from.data[r * from.stride + c];
    }
  });
}

}  // namespace llmdpd
