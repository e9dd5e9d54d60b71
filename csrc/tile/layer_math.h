// What layers are made of, on rows of hidden numbers that are padded with zeros.
#pragma once

#include "dense.h"
#include "layer_kernels.h"

namespace {

using llmdpd::LayerNorm;
using llmdpd::RowStats;

constexpr float kNormEpsilon = 1e-5f;

// Hands out parts of a thread's scratch memory, each aligned to a vector.
class ScratchParts {
 public:
  explicit ScratchParts(float* base) : base_(base), next_(base) {}
  float* take(std::ptrdiff_t floats) {
    float* part = next_;
    next_ += (floats + kWidth - 1) / kWidth * kWidth;
    return part;
  }
  std::ptrdiff_t used() const { return next_ - base_; }

 private:
  float *base_, *next_;
};

// tanh x = 1 - 2 / (e^2x + 1); within 1.2e-7 of it.
inline __attribute__((always_inline)) Vec hyperbolic_tangent(Vec x) {
  const Vec cap = broadcast(10.0f);  // 1 in float32 from there on
  const Vec bounded = x > cap ? cap : x;
  return broadcast(1.0f) - broadcast(2.0f) / (exp_bounded(bounded + bounded) + broadcast(1.0f));
}

// (1 + erf(x / sqrt 2)) / 2, the normal distribution up to x, within 1e-7; and e^(-x² / 2) beside it. With
// z = |x| / sqrt 2, erf(z) is z times a polynomial in z² below 1, and from 1 on 1 - t e^(-z²) times one in
// t = 1 / (1 + z / 2): what is left of 1 is small there, and its rounding with it. Both are least-squares fits in double
// precision, within 1.3e-9 of erf.
inline __attribute__((always_inline)) Vec normal_share(Vec x, Vec& density) {
  const Vec one = broadcast(1.0f), z = (x < Vec{} ? -x : x) * broadcast(0.70710678f), square = z * z;
  density = exp_bounded(-square);
  Vec inner = broadcast(7.64711658e-5f);
  inner = fma(inner, square, broadcast(-7.94235617e-4f));
  inner = fma(inner, square, broadcast(5.17974934e-3f));
  inner = fma(inner, square, broadcast(-2.68485919e-2f));
  inner = fma(inner, square, broadcast(1.12834305e-1f));
  inner = fma(inner, square, broadcast(-3.76126051e-1f));
  inner = fma(inner, square, broadcast(1.12837911f));
  const Vec t = one / fma(broadcast(0.5f), z, one);
  Vec outer = broadcast(-0.203300327f);
  outer = fma(outer, t, broadcast(0.556232154f));
  outer = fma(outer, t, broadcast(0.0293664169f));
  outer = fma(outer, t, broadcast(0.342270494f));
  outer = fma(outer, t, broadcast(0.275491863f));
  const Vec erf = z < one ? z * inner : one - outer * t * density;
  return broadcast(0.5f) * (x < Vec{} ? one - erf : one + erf);
}

// GELU(x) = x (1 + erf(x / sqrt 2)) / 2.
inline __attribute__((always_inline)) Vec gelu(Vec x) {
  Vec density;
  return x * normal_share(x, density);
}

// GELU'(x) = (1 + erf(x / sqrt 2)) / 2 + x e^(-x² / 2) / sqrt(2 pi).
inline __attribute__((always_inline)) Vec gelu_derivative(Vec x) {
  Vec density;
  const Vec share = normal_share(x, density);
  return fma(x * density, broadcast(0.39894228f), share);
}

// The sum and the maximum of a vector's numbers, by halves: as quick as it is on every instruction set.
inline __attribute__((always_inline)) float sum_of(Vec v) {
  float numbers[kWidth];
  store(numbers, v);
#pragma GCC unroll 4
  for (int half = kWidth / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) numbers[i] += numbers[i + half];
  }
  return numbers[0];
}
inline __attribute__((always_inline)) float largest_of(Vec v) {
  float numbers[kWidth];
  store(numbers, v);
#pragma GCC unroll 4
  for (int half = kWidth / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) numbers[i] = numbers[i + half] > numbers[i] ? numbers[i + half] : numbers[i];
  }
  return numbers[0];
}

inline void apply(const PackedLayer& layer, RowInput x, Init init, StoreFloat out, std::ptrdiff_t rows) {
  // Blocks of nearly as many rows each: the last one of a few would wait for its sums.
  for (std::ptrdiff_t blocks = (rows + kMaxBlock - 1) / kMaxBlock; blocks > 0; --blocks) {
    const int count = static_cast<int>((rows + blocks - 1) / blocks);
    dense<Single, kMaxBlock>(packed_tiles_of(layer), x, init, out, count, layer.outputs_padded / kWidth);
    x = x.from(count);
    init = init.from(count);
    out = out.from(count);
    rows -= count;
  }
}

// The layer norm of rows of `width` numbers; those that pad them come out zero. `stats`, where asked for: of each row.
inline void normalise(const LayerNorm& norm, int width, const float* rows_in, float* rows_out, std::ptrdiff_t stride,
                      std::ptrdiff_t rows, RowStats* stats = nullptr) {
  const int whole = width / kWidth * kWidth;
  for (std::ptrdiff_t r = 0; r < rows; ++r) {
    const float* in = rows_in + r * stride;
    float* out = rows_out + r * stride;
    Vec sums{};
    for (int c = 0; c < whole; c += kWidth) sums = sums + load(in + c);
    float sum = sum_of(sums);
    for (int c = whole; c < width; ++c) sum += in[c];
    const float mean = sum / static_cast<float>(width);
    Vec squares{};
    for (int c = 0; c < whole; c += kWidth) {
      const Vec away = load(in + c) - broadcast(mean);
      squares = fma(away, away, squares);
    }
    float square = sum_of(squares);
    for (int c = whole; c < width; ++c) square += (in[c] - mean) * (in[c] - mean);
    const float scale = 1.0f / __builtin_sqrtf(square / static_cast<float>(width) + kNormEpsilon);
    if (stats) stats[r] = {mean, scale};
    for (int c = 0; c < width; c += kWidth) {
      store(out + c, fma((load(in + c) - broadcast(mean)) * broadcast(scale), load(norm.weight + c),
                         load(norm.bias + c)));
    }
  }
}

// From the gradient of a layer norm's results, in `gradient`, to that of its inputs, added to `total`; the gradients of
// its weight and bias are added to `of_norm` [2, stride].
inline void normalise_backward(const LayerNorm& norm, int width, const float* inputs, const RowStats* stats,
                               const float* gradient, float* total, float* of_norm, std::ptrdiff_t stride,
                               std::ptrdiff_t rows) {
  const float share = 1.0f / static_cast<float>(width);
  for (std::ptrdiff_t r = 0; r < rows; ++r) {
    const float *in = inputs + r * stride, *d = gradient + r * stride;
    float* to = total + r * stride;
    const Vec mean = broadcast(stats[r].mean), scale = broadcast(stats[r].scale);
    Vec sums{}, products{};
    for (int c = 0; c < width; c += kWidth) {  // the weight pads with zeros
      const Vec unit = (load(in + c) - mean) * scale, weighted = load(d + c) * load(norm.weight + c);
      sums = sums + weighted;
      products = fma(weighted, unit, products);
      store(of_norm + c, fma(load(d + c), unit, load(of_norm + c)));
      store(of_norm + stride + c, load(of_norm + stride + c) + load(d + c));
    }
    const Vec sum = broadcast(share * sum_of(sums)), product = broadcast(share * sum_of(products));
    for (int c = 0; c < width; c += kWidth) {
      const Vec unit = (load(in + c) - mean) * scale, weighted = load(d + c) * load(norm.weight + c);
      store(to + c, load(to + c) + scale * (weighted - sum - unit * product));
    }
    for (int c = width; c < width + kWidth - 1 && c % kWidth != 0; ++c) to[c] = 0.0f;
  }
}

// to += added. After the sums of a product, not as what they start from: each of their many roundings would then be as
// large as the number that is added to.
inline void add_rows(const float* added, int width, float* to, std::ptrdiff_t stride, std::ptrdiff_t rows) {
  for (std::ptrdiff_t r = 0; r < rows; ++r) {
    for (int c = 0; c < width; c += kWidth) {
      float* at = to + r * stride + c;
      store(at, load(at) + load(added + r * stride + c));
    }
  }
}

// In place, of rows that begin `stride` apart. Scores of -inf mark what is no step.
inline void softmax(float* rows_in, std::ptrdiff_t stride, int length, std::ptrdiff_t rows) {
  for (std::ptrdiff_t r = 0; r < rows; ++r) {
    float* row = rows_in + r * stride;
    Vec most = load(row);
    for (int c = kWidth; c < length; c += kWidth) {
      const Vec next = load(row + c);
      most = next > most ? next : most;
    }
    const Vec largest = broadcast(largest_of(most));
    Vec sums{};
    for (int c = 0; c < length; c += kWidth) {
      const Vec power = exp_bounded(load(row + c) - largest);
      store(row + c, power);
      sums = sums + power;
    }
    const Vec scale = broadcast(1.0f / sum_of(sums));
    for (int c = 0; c < length; c += kWidth) store(row + c, load(row + c) * scale);
  }
}

// From the gradient of the softmax's results to that of its inputs, in place.
inline void softmax_backward(const float* weights, float* gradient, std::ptrdiff_t stride, int length,
                             std::ptrdiff_t rows) {
  for (std::ptrdiff_t r = 0; r < rows; ++r) {
    const float* p = weights + r * stride;
    float* d = gradient + r * stride;
    Vec sums{};
    for (int c = 0; c < length; c += kWidth) sums = fma(load(p + c), load(d + c), sums);
    const Vec sum = broadcast(sum_of(sums));
    for (int c = 0; c < length; c += kWidth) store(d + c, load(p + c) * (load(d + c) - sum));
  }
}

// Rows of `width` numbers with zeros beside them, and back.
inline void pad_rows(const float* from, int width, float* to, std::ptrdiff_t stride, std::ptrdiff_t rows) {
  for (std::ptrdiff_t r = 0; r < rows; ++r) {
    __builtin_memcpy(to + r * stride, from + r * width, width * sizeof(float));
    for (std::ptrdiff_t c = width; c < stride; ++c) to[r * stride + c] = 0.0f;
  }
}
inline void unpad_rows(const float* from, std::ptrdiff_t stride, float* to, int width, std::ptrdiff_t rows) {
  for (std::ptrdiff_t r = 0; r < rows; ++r) {
    __builtin_memcpy(to + r * width, from + r * stride, width * sizeof(float));
  }
}

inline void clear(float* to, std::ptrdiff_t count) {
  for (std::ptrdiff_t i = 0; i < count; ++i) to[i] = 0.0f;
}

// Sums of products over rows: eight outputs by two vectors of inputs are accumulators enough.
constexpr int kGramRows = kWidth >= 8 ? 8 : 4;
// A task of outputs shares what it reads of `right`, so many rows of which stay in the first-level cache.
constexpr int kGramTask = 4 * kGramRows;
constexpr std::ptrdiff_t kGramBlock = 128;

// Of a row that ends after `count` numbers, a vector; and back.
inline __attribute__((always_inline)) Vec load_first(const float* from, int count) {
  if (count >= kWidth) return load(from);
  float numbers[kWidth] = {};
  if (count > 0) __builtin_memcpy(numbers, from, count * sizeof(float));
  return load(numbers);
}
inline __attribute__((always_inline)) void store_first(float* to, int count, Vec v) {
  if (count >= kWidth) return store(to, v);
  float numbers[kWidth];
  store(numbers, v);
  if (count > 0) __builtin_memcpy(to, numbers, count * sizeof(float));
}

// Of a block of rows; `more`: onto the sums of those before.
template <int outputs, int vectors>
inline __attribute__((always_inline)) void gram_block(const float* left, std::ptrdiff_t left_stride, const float* right,
                                                      std::ptrdiff_t right_stride, std::ptrdiff_t rows, float* out,
                                                      std::ptrdiff_t out_stride, int columns, bool more) {
  Vec sum[outputs][vectors] = {};
  for (int o = 0; more && o < outputs; ++o) {
    for (int v = 0; v < vectors; ++v) sum[o][v] = load_first(out + o * out_stride + v * kWidth, columns - v * kWidth);
  }
  for (std::ptrdiff_t k = 0; k < rows; ++k) {
    Vec x[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) x[v] = load(right + k * right_stride + v * kWidth);
#pragma GCC unroll 8
    for (int o = 0; o < outputs; ++o) {
      const Vec y = broadcast(left[k * left_stride + o]);
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sum[o][v] = fma(y, x[v], sum[o][v]);
    }
  }
  for (int o = 0; o < outputs; ++o) {
    for (int v = 0; v < vectors; ++v) store_first(out + o * out_stride + v * kWidth, columns - v * kWidth, sum[o][v]);
  }
}

template <int vectors>
inline void gram_columns(const float* left, std::ptrdiff_t left_stride, const float* right, std::ptrdiff_t right_stride,
                         std::ptrdiff_t rows, float* out, std::ptrdiff_t out_stride, int outputs, int columns,
                         bool more) {
  int o = 0;
  for (; o + kGramRows <= outputs; o += kGramRows) {
    gram_block<kGramRows, vectors>(left + o, left_stride, right, right_stride, rows, out + o * out_stride, out_stride,
                                   columns, more);
  }
  for (; o < outputs; ++o) {
    gram_block<1, vectors>(left + o, left_stride, right, right_stride, rows, out + o * out_stride, out_stride, columns,
                           more);
  }
}

// out[outputs, columns] = left' right over the rows; `right` may be read up to whole vectors. Each sum is one, in the
// order of the rows.
inline void gram_any(const float* left, std::ptrdiff_t left_stride, const float* right, std::ptrdiff_t right_stride,
                     std::ptrdiff_t rows, float* out, std::ptrdiff_t out_stride, int outputs, int columns) {
  for (std::ptrdiff_t k = 0; k == 0 || k < rows; k += kGramBlock) {
    const std::ptrdiff_t some = rows - k < kGramBlock ? rows - k : kGramBlock;
    const float *l = left + k * left_stride, *r = right + k * right_stride;
    int c = 0;
    for (; columns - c > kWidth; c += 2 * kWidth) {
      gram_columns<2>(l, left_stride, r + c, right_stride, some, out + c, out_stride, outputs, columns - c, k > 0);
    }
    if (c < columns) {
      gram_columns<1>(l, left_stride, r + c, right_stride, some, out + c, out_stride, outputs, columns - c, k > 0);
    }
  }
}

}  // namespace
