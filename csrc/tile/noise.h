// Counter-based noise: Philox4x32-10 (Salmon et al. 2011) and Box-Muller, a vector of counters at a time. A number is a
// pure function of (key, row, draw, action dimension): it does not depend on batch split, thread count or device.
#pragma once

#include "simd.h"
#include "tile_kernels.h"

namespace {

using llmdpd::NoiseKeys;

constexpr unsigned kSamplerStream = 0;  // the counter's fourth word

typedef unsigned UIntVec __attribute__((vector_size(4 * kWidth), may_alias));

// Low and high words of the products with a constant.
inline __attribute__((always_inline)) void multiply(UIntVec a, unsigned constant, UIntVec& low, UIntVec& high) {
#if defined(LLMDPD_ISA_avx512)
  const __m512i c = _mm512_set1_epi32((int)constant);
  const __m512i even = _mm512_mul_epu32((__m512i)a, c), odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), c);
  low = (UIntVec)_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
  high = (UIntVec)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
#elif defined(LLMDPD_ISA_avx2)
  const __m256i c = _mm256_set1_epi32((int)constant);
  const __m256i even = _mm256_mul_epu32((__m256i)a, c), odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), c);
  low = (UIntVec)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  high = (UIntVec)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
#else
  for (int i = 0; i < kWidth; ++i) {
    const unsigned long long product = (unsigned long long)a[i] * constant;
    low[i] = (unsigned)product;
    high[i] = (unsigned)(product >> 32);
  }
#endif
}

inline __attribute__((always_inline)) void philox4x32(UIntVec counter[4], UIntVec key0, UIntVec key1) {
  for (int round = 0; round < 10; ++round) {
    UIntVec low0, high0, low1, high1;
    multiply(counter[0], 0xD2511F53u, low0, high0);
    multiply(counter[2], 0xCD9E8D57u, low1, high1);
    counter[0] = high1 ^ counter[1] ^ key0;
    counter[1] = low1;
    counter[2] = high0 ^ counter[3] ^ key1;
    counter[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

inline __attribute__((always_inline)) Vec square_root(Vec x) {
#if defined(LLMDPD_ISA_avx512)
  return (Vec)_mm512_sqrt_ps((__m512)x);
#elif defined(LLMDPD_ISA_avx2)
  return (Vec)_mm256_sqrt_ps((__m256)x);
#else
  Vec root;
  for (int i = 0; i < kWidth; ++i) root[i] = __builtin_sqrtf(x[i]);
  return root;
#endif
}

// ln(n / 2^24) for integers n from 1 to 2^24. Near 2^24, where the result is near 0, the argument of the polynomial is
// exact: the error is relative.
inline __attribute__((always_inline)) Vec log_of_uniform(Vec n) {
  const IntVec bits = (IntVec)n;
  // Mantissa in [sqrt(1/2), sqrt(2)), and the exponent that goes with it.
  const IntVec above = (bits & 0x7fffff) > 0x3504f3;  // true is -1
  const IntVec exponent = (bits >> 23) - 127 - above - 24;
  const Vec f = (Vec)((bits & 0x7fffff) | (IntVec)(0x3f800000 + (above << 23))) - broadcast(1.0f);
  const Vec z = f * f;
  Vec p = broadcast(7.0376836292e-2f);
  p = fma(p, f, broadcast(-1.1514610310e-1f));
  p = fma(p, f, broadcast(1.1676998740e-1f));
  p = fma(p, f, broadcast(-1.2420140846e-1f));
  p = fma(p, f, broadcast(1.4249322787e-1f));
  p = fma(p, f, broadcast(-1.6668057665e-1f));
  p = fma(p, f, broadcast(2.0000714765e-1f));
  p = fma(p, f, broadcast(-2.4999993993e-1f));
  p = fma(p, f, broadcast(3.3333331174e-1f));
  const Vec e = __builtin_convertvector(exponent, Vec);
  Vec y = f * z * p;
  y = fma(e, broadcast(-2.12194440e-4f), y);
  y = fma(z, broadcast(-0.5f), y);
  return fma(e, broadcast(0.693359375f), f + y);
}

// cos and sin of 2 pi v for v in [0, 1), a multiple of 2^-24: quarter turns are taken off exactly.
inline __attribute__((always_inline)) void cos_sin_of_turns(Vec v, Vec& cosine, Vec& sine) {
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const Vec shifted = v * broadcast(4.0f) + magic;
  const IntVec quadrant = (IntVec)shifted & 3;
  const Vec x = (v - (shifted - magic) * broadcast(0.25f)) * broadcast(6.283185307f);
  const Vec z = x * x;
  Vec s = broadcast(-1.9515295891e-4f);
  s = fma(s, z, broadcast(8.3321608736e-3f));
  s = fma(s, z, broadcast(-1.6666654611e-1f));
  s = fma(s * z, x, x);
  Vec c = broadcast(2.443315711809948e-5f);
  c = fma(c, z, broadcast(-1.388731625493765e-3f));
  c = fma(c, z, broadcast(4.166664568298827e-2f));
  c = fma(c * z, z, fma(z, broadcast(-0.5f), broadcast(1.0f)));
  const IntVec swap = (quadrant & 1) == 1, negative_cos = ((quadrant + 1) & 2) == 2, negative_sin = (quadrant & 2) == 2;
  const Vec first = swap ? s : c, second = swap ? c : s;
  cosine = negative_cos ? -first : first;
  sine = negative_sin ? -second : second;
}

// Standard normals [draws, rows, A] of some rows and draws.
void normals(const NoiseKeys& keys, std::ptrdiff_t first_row, int rows, int first_draw, int draws, float* out) {
  const int action_dim = keys.action_dim, blocks = (action_dim + 3) / 4;
  const std::ptrdiff_t items = (std::ptrdiff_t)draws * rows * blocks;
  for (std::ptrdiff_t first = 0; first < items; first += kWidth) {
    const int lanes = items - first < kWidth ? (int)(items - first) : kWidth;
    unsigned words[6][kWidth] = {};
    float* to[kWidth];
    int block_of[kWidth];
    for (int lane = 0; lane < lanes; ++lane) {
      const std::ptrdiff_t item = first + lane;
      const int block = (int)(item % blocks), r = (int)(item / blocks % rows), d = (int)(item / blocks / rows);
      const std::ptrdiff_t row = first_row + r, state = row / keys.samples;
      const std::uint64_t key = keys.keys[keys.per_state ? state : 0];
      words[0][lane] = (unsigned)(keys.per_state ? row % keys.samples : row);
      words[1][lane] = (unsigned)(first_draw + d);
      words[2][lane] = (unsigned)block;
      words[3][lane] = kSamplerStream;
      words[4][lane] = (unsigned)key;
      words[5][lane] = (unsigned)(key >> 32);
      to[lane] = out + ((std::ptrdiff_t)d * rows + r) * action_dim + 4 * block;
      block_of[lane] = block;
    }
    UIntVec loaded[6];
    __builtin_memcpy(loaded, words, sizeof loaded);
    philox4x32(loaded, loaded[4], loaded[5]);
    float numbers[4][kWidth];
    for (int pair = 0; pair < 2; ++pair) {
      const Vec n = __builtin_convertvector((IntVec)(loaded[2 * pair] >> 8) + 1, Vec);
      const Vec v =
          __builtin_convertvector((IntVec)(loaded[2 * pair + 1] >> 8), Vec) * broadcast(5.9604644775390625e-8f);
      const Vec radius = square_root(broadcast(-2.0f) * log_of_uniform(n));
      Vec cosine, sine;
      cos_sin_of_turns(v, cosine, sine);
      store(numbers[2 * pair], radius * cosine);
      store(numbers[2 * pair + 1], radius * sine);
    }
    for (int lane = 0; lane < lanes; ++lane) {
      const int left = action_dim - 4 * block_of[lane], count = left < 4 ? left : 4;
      for (int i = 0; i < count; ++i) to[lane][i] = numbers[i][lane];
    }
  }
}

}  // namespace
