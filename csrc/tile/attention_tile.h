// One attention layer with its feed-forward, forward and backward, on the rows of one group.
#pragma once

#include "layer_math.h"
#include "pack.h"

namespace {

using llmdpd::AttentionCall;
using llmdpd::AttentionGradients;

// Scratch of one group.
struct AttentionScratch {
  float *keys, *values, *norm, *found, *weights, *zeros;
  std::ptrdiff_t zero_count;  // as many as any product of the layer has results in a row
  std::ptrdiff_t floats;

  AttentionScratch(const AttentionCall& call, float* base) {
    ScratchParts parts(base);
    const int each = call.head_width(), each_padded = llmdpd::padded(each, kWidth);
    const std::ptrdiff_t larger = call.steps_padded > each_padded ? call.steps_padded : each_padded;
    keys = parts.take(larger * (call.steps > each ? call.steps : each));
    values = parts.take(larger * (call.steps > each ? call.steps : each));
    norm = parts.take(call.rows * call.stride);
    found = parts.take(call.rows * call.stride);
    weights = parts.take(static_cast<std::ptrdiff_t>(call.rows) * call.steps_padded);
    const std::ptrdiff_t widest = call.wide_stride > call.stride ? call.wide_stride : call.stride;
    zero_count = widest > call.steps_padded ? widest : call.steps_padded;
    zeros = parts.take(zero_count);
    floats = parts.used();
  }
};

std::size_t attention_scratch(const AttentionCall& call) {
  float origin[1];
  return static_cast<std::size_t>(AttentionScratch(call, origin).floats);
}

// A head's part of [T, W] as a layer: from a row of `each` numbers to scores of T steps …
inline PackedLayer to_steps(const float* head, int width, int each, int steps, float* memory) {
  pack(head, width, steps, each, false, false, memory);
  return {memory, nullptr, each, llmdpd::padded(steps, kWidth)};
}
// … or from weights of T steps to `each` numbers.
inline PackedLayer from_steps(const float* head, int width, int each, int steps, float* memory) {
  pack(head, width, steps, each, true, false, memory);
  return {memory, nullptr, steps, llmdpd::padded(each, kWidth)};
}

// [T] to what scores begin with, [steps_padded]: -inf where there is no step.
inline void pad_scores(const float* bias, int steps, int steps_padded, float* to) {
  for (int t = 0; t < steps_padded; ++t) to[t] = t < steps ? bias[t] : -__builtin_inff();
}

void attention_forward(const AttentionCall& call, int group, float* memory) {
  const AttentionScratch scratch(call, memory);
  const std::ptrdiff_t stride = call.stride, wide = call.wide_stride, first = static_cast<std::ptrdiff_t>(group) * call.rows;
  const int width = call.width, rows = call.rows, each = call.head_width();
  const std::ptrdiff_t all_heads = static_cast<std::ptrdiff_t>(call.heads) * call.steps_padded;
  float *input = call.input + first * stride, *normed = call.normed + first * stride;
  float *query = call.query + first * stride, *found = call.found + first * stride;
  float *middle = call.middle + first * stride, *forward_normed = call.forward_normed + first * stride;
  float *wide_rows = call.wide + first * wide, *active = call.active + first * wide;
  pad_rows(call.hidden + first * width, width, input, stride, rows);
  normalise(call.layer.query_norm, width, input, normed, stride, rows, call.stats + first);
  apply(call.layer.query, {normed, stride}, {call.layer.query.bias, 0}, {query, stride}, rows);
  const Vec scale = broadcast(1.0f / __builtin_sqrtf(static_cast<float>(each)));
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < width; c += kWidth) store(query + r * stride + c, scale * load(query + r * stride + c));
  }
  pad_scores(call.bias + static_cast<std::ptrdiff_t>(group) * call.steps, call.steps, call.steps_padded, scratch.weights);
  clear(scratch.zeros, scratch.zero_count);
  const std::ptrdiff_t memory_rows = static_cast<std::ptrdiff_t>(group) * call.steps * width;
  for (int head = 0; head < call.heads; ++head) {
    const PackedLayer keys = to_steps(call.key + memory_rows + head * each, width, each, call.steps, scratch.keys);
    const PackedLayer values = from_steps(call.value + memory_rows + head * each, width, each, call.steps, scratch.values);
    float* weights = call.weights + first * all_heads + head * call.steps_padded;
    apply(keys, {query + head * each, stride}, {scratch.weights, 0}, {weights, all_heads}, rows);
    softmax(weights, all_heads, call.steps_padded, rows);
    apply(values, {weights, all_heads}, {scratch.zeros, 0}, {found + head * each, stride}, rows);
  }
  apply(call.layer.out, {found, stride}, {call.layer.out.bias, 0}, {middle, stride}, rows);
  add_rows(input, width, middle, stride, rows);
  normalise(call.layer.forward_norm, width, middle, forward_normed, stride, rows, call.forward_stats + first);
  apply(call.layer.widen, {forward_normed, stride}, {call.layer.widen.bias, 0}, {wide_rows, wide}, rows);
  for (int r = 0; r < rows; ++r) {
    for (std::ptrdiff_t c = 0; c + kWidth < wide; c += kWidth) {
      store(active + r * wide + c, gelu(load(wide_rows + r * wide + c)));
    }
  }
  apply(call.layer.narrow, {active, wide}, {call.layer.narrow.bias, 0}, {scratch.norm, stride}, rows);
  add_rows(middle, width, scratch.norm, stride, rows);
  unpad_rows(scratch.norm, stride, call.out + first * width, width, rows);
}

// The gradients of one head's attention: of its queries, keys and values, from that of what it found.
void head_backward(const AttentionCall& call, const AttentionGradients& gradients, int group, int head,
                   const AttentionScratch& scratch) {
  const std::ptrdiff_t stride = call.stride, first = static_cast<std::ptrdiff_t>(group) * call.rows;
  const int width = call.width, rows = call.rows, each = call.head_width(), steps = call.steps;
  const std::ptrdiff_t all_heads = static_cast<std::ptrdiff_t>(call.heads) * call.steps_padded;
  const std::ptrdiff_t part = static_cast<std::ptrdiff_t>(group) * steps * width + head * each;
  const float* weights = call.weights + first * all_heads + head * call.steps_padded;
  const float* found = scratch.found + head * each;
  const PackedLayer values = to_steps(call.value + part, width, each, steps, scratch.values);
  apply(values, {found, stride}, {scratch.zeros, 0}, {scratch.weights, call.steps_padded}, rows);
  gram_any(weights, all_heads, found, stride, rows, gradients.value + part, width, steps, each);
  for (int r = 0; r < rows; ++r) {
    softmax_backward(weights + r * all_heads, scratch.weights + r * call.steps_padded, 0, call.steps_padded, 1);
  }
  gram_any(scratch.weights, call.steps_padded, call.query + first * stride + head * each, stride, rows,
           gradients.key + part, width, steps, each);
  const PackedLayer keys = from_steps(call.key + part, width, each, steps, scratch.keys);
  apply(keys, {scratch.weights, call.steps_padded}, {scratch.zeros, 0},
        {gradients.d_query + first * stride + head * each, stride}, rows);
}

void attention_backward(const AttentionCall& call, const AttentionGradients& gradients, int group, float* memory) {
  const AttentionScratch scratch(call, memory);
  const std::ptrdiff_t stride = call.stride, wide = call.wide_stride, first = static_cast<std::ptrdiff_t>(group) * call.rows;
  const int width = call.width, rows = call.rows, each = call.head_width();
  float *d_out = gradients.d_out + first * stride, *d_middle = gradients.d_middle + first * stride;
  float *d_query = gradients.d_query + first * stride, *d_wide = gradients.d_wide + first * wide;
  float* norms = gradients.norms + static_cast<std::ptrdiff_t>(group) * 4 * stride;
  clear(norms, 4 * stride);
  clear(scratch.zeros, scratch.zero_count);
  const Init none{scratch.zeros, 0};
  pad_rows(gradients.out + first * width, width, d_out, stride, rows);
  apply(call.narrow_transposed, {d_out, stride}, none, {d_wide, wide}, rows);
  for (int r = 0; r < rows; ++r) {
    for (std::ptrdiff_t c = 0; c + kWidth < wide; c += kWidth) {
      store(d_wide + r * wide + c, load(d_wide + r * wide + c) * gelu_derivative(load(call.wide + (first + r) * wide + c)));
    }
  }
  apply(call.widen_transposed, {d_wide, wide}, none, {scratch.norm, stride}, rows);
  pad_rows(gradients.out + first * width, width, d_middle, stride, rows);
  normalise_backward(call.layer.forward_norm, width, call.middle + first * stride, call.forward_stats + first,
                     scratch.norm, d_middle, norms + 2 * stride, stride, rows);
  apply(call.out_transposed, {d_middle, stride}, none, {scratch.found, stride}, rows);
  for (int head = 0; head < call.heads; ++head) head_backward(call, gradients, group, head, scratch);
  const Vec scale = broadcast(1.0f / __builtin_sqrtf(static_cast<float>(each)));
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < width; c += kWidth) store(d_query + r * stride + c, scale * load(d_query + r * stride + c));
  }
  apply(call.query_transposed, {d_query, stride}, none, {scratch.norm, stride}, rows);
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < width; c += kWidth) store(scratch.found + r * stride + c, load(d_middle + r * stride + c));
  }
  normalise_backward(call.layer.query_norm, width, call.input + first * stride, call.stats + first, scratch.norm,
                     scratch.found, norms, stride, rows);
  unpad_rows(scratch.found, stride, gradients.hidden + first * width, width, rows);
}

}  // namespace
