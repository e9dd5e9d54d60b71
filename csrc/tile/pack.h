// Weight matrices into panels.
#pragma once

#include "words.h"

namespace {

// Up to kWidth numbers, zero beyond `count`.
inline Vec load_some(const float* from, int count) {
  if (count >= kWidth) return load(from);
  float buffer[kWidth] = {};
  for (int i = 0; i < count; ++i) buffer[i] = from[i];
  return load(buffer);
}

template <class Op>
void pack_plain(const float* weights, std::ptrdiff_t stride, int outputs, int inputs, float* panels) {
  constexpr int per_word = Op::kPerWord;
  const int words = (inputs + per_word - 1) / per_word;
  for (int first = 0; first < outputs; first += kWidth) {
    const float* from = weights + first * stride;
    float* to = panels + static_cast<std::ptrdiff_t>(first) * words;
    const int count = outputs - first < kWidth ? outputs - first : kWidth;
    int k = 0;
    for (; count == kWidth && (k + kWidth) * per_word <= inputs; k += kWidth) {
      Vec square[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) square[i] = Op::load_words(from + i * stride + k * per_word);
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) store(to + (k + i) * kWidth, square[i]);
    }
    for (; k < words; ++k) {
      for (int i = 0; i < kWidth; ++i) {
        const int column = k * per_word;
        const float one = i < count ? from[i * stride + column] : 0.0f;
        const float two = i < count && column + 1 < inputs ? from[i * stride + column + 1] : 0.0f;
        to[k * kWidth + i] = Op::word(one, two);
      }
    }
  }
}

template <class Op>
void pack_transposed(const float* weights, std::ptrdiff_t stride, int outputs, int inputs, float* panels) {
  constexpr int per_word = Op::kPerWord;
  const int words = (outputs + per_word - 1) / per_word;
  for (int first = 0; first < inputs; first += kWidth) {
    float* to = panels + static_cast<std::ptrdiff_t>(first) * words;
    const int count = inputs - first;
    int o = 0;
    for (; o + 2 <= outputs; o += 2) {
      const float* from = weights + o * stride + first;
      Op::store_rows(to, o, load_some(from, count), load_some(from + stride, count));
    }
    if (o < outputs) {
      float buffer[2 * kWidth];
      Op::store_rows(buffer, 0, load_some(weights + o * stride + first, count), Vec{});
      store(to + o / per_word * kWidth, load(buffer));
    }
  }
}

void pack(const float* weights, std::ptrdiff_t stride, int outputs, int inputs, bool transposed, bool in_words,
          float* panels) {
  if (transposed) {
    (in_words ? pack_transposed<Trunk> : pack_transposed<Single>)(weights, stride, outputs, inputs, panels);
  } else {
    (in_words ? pack_plain<Trunk> : pack_plain<Single>)(weights, stride, outputs, inputs, panels);
  }
}

}  // namespace
