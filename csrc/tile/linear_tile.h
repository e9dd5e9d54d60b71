// Linear layers on one input, behind a layer norm where there is one, on a chunk of rows.
#pragma once

#include "layer_math.h"

namespace {

using llmdpd::Gram;
using llmdpd::LinearCall;
using llmdpd::LinearGradients;

std::ptrdiff_t widest(const LinearCall& call) {
  std::ptrdiff_t most = call.stride;
  for (int i = 0; i < call.layers; ++i) {
    const std::ptrdiff_t padded = llmdpd::padded(call.outputs[i], kWidth);
    most = padded > most ? padded : most;
  }
  return most;
}

// Room for two blocks of rows, and one row of zeros.
std::size_t linear_scratch(const LinearCall& call, std::ptrdiff_t rows) {
  return static_cast<std::size_t>((2 * rows + 1) * widest(call));
}

// sums[outputs] of `left` over the rows.
template <int constant>
inline void sum_columns(const float* left, std::ptrdiff_t left_stride, std::ptrdiff_t rows, int outputs, float* sums) {
  float sum[kGramTask] = {};
  for (std::ptrdiff_t k = 0; k < rows; ++k) {
    for (int o = 0; o < (constant ? constant : outputs); ++o) sum[o] += left[k * left_stride + o];
  }
  __builtin_memcpy(sums, sum, outputs * sizeof(float));
}

void gram(const Gram& gram, int first_output) {
  const int outputs = gram.outputs - first_output < kGramTask ? gram.outputs - first_output : kGramTask;
  const float* left = gram.left + first_output;
  gram_any(left, gram.left_stride, gram.right, gram.right_stride, gram.rows, gram.out + first_output * gram.out_stride,
           gram.out_stride, outputs, gram.inputs);
  if (!gram.sums) return;
  (outputs == kGramTask ? sum_columns<kGramTask> : sum_columns<0>)(left, gram.left_stride, gram.rows, outputs,
                                                                   gram.sums + first_output);
}

void linear_forward(const LinearCall& call, std::ptrdiff_t first, std::ptrdiff_t rows, float* scratch) {
  float* input = call.input + first * call.stride;
  pad_rows(call.x + first * call.inputs, call.inputs, input, call.stride, rows);
  if (call.norm.weight) {
    normalise(call.norm, call.inputs, input, call.normed + first * call.stride, call.stride, rows, call.stats + first);
  }
  if (call.layers == 0) unpad_rows(call.normed + first * call.stride, call.stride, call.out[0] + first * call.inputs, call.inputs, rows);
  for (int i = 0; i < call.layers; ++i) {
    const PackedLayer& layer = call.forward[i];
    apply(layer, {call.normed + first * call.stride, call.stride}, {layer.bias, 0}, {scratch, layer.outputs_padded}, rows);
    unpad_rows(scratch, layer.outputs_padded, call.out[i] + first * call.outputs[i], call.outputs[i], rows);
  }
}

void linear_backward(const LinearCall& call, const LinearGradients& gradients, std::ptrdiff_t first,
                     std::ptrdiff_t rows, int chunk, float* scratch) {
  const std::ptrdiff_t stride = call.stride;
  float *sum = scratch, *total = scratch + rows * stride, *zeros = scratch + 2 * rows * stride;
  clear(zeros, stride);
  if (call.layers == 0) pad_rows(gradients.out[0] + first * call.inputs, call.inputs, sum, stride, rows);
  for (int i = 0; i < call.layers; ++i) {
    const Init init = i == 0 ? Init{zeros, 0} : Init{sum, stride};
    const RowInput d_out{gradients.out[i] + first * call.outputs[i], call.outputs[i]};
    apply(call.backward[i], d_out, init, {sum, stride}, rows);
  }
  if (call.norm.weight) {
    float* of_norm = gradients.norm + chunk * 2 * stride;
    clear(of_norm, 2 * stride);
    clear(total, rows * stride);
    normalise_backward(call.norm, call.inputs, call.input + first * stride, call.stats + first, sum, total, of_norm,
                       stride, rows);
    sum = total;
  }
  unpad_rows(sum, stride, gradients.x + first * call.inputs, call.inputs, rows);
}

}  // namespace
