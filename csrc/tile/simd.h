// One vector type for each instruction set, on the vector extension that GCC and Clang share. Only what that extension
// lacks needs naming. The headers of this folder and whatever includes them must not instantiate anything from the
// standard library: the linker could keep the AVX-512 copy of a shared inline function for all.
#pragma once

#if defined(LLMDPD_ISA_avx512) || defined(LLMDPD_ISA_avx2)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

#if defined(LLMDPD_ISA_avx512)
constexpr int kWidth = 16;
constexpr int kMaxBlock = 12;  // 24 of 32 registers accumulate
#elif defined(LLMDPD_ISA_avx2)
constexpr int kWidth = 8;
constexpr int kMaxBlock = 6;  // 12 of 16
#else
constexpr int kWidth = 4;
constexpr int kMaxBlock = 6;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth), may_alias));
typedef int IntVec __attribute__((vector_size(4 * kWidth), may_alias));
// As Vec, for memory that is aligned like a float only.
typedef float VecUnaligned __attribute__((vector_size(4 * kWidth), may_alias, aligned(4)));

inline __attribute__((always_inline)) Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
inline __attribute__((always_inline)) void store(float* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = v; }
inline __attribute__((always_inline)) Vec broadcast(float x) { return x - Vec{}; }

inline __attribute__((always_inline)) Vec fma(Vec a, Vec b, Vec c) {
#if defined(LLMDPD_ISA_avx512)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(LLMDPD_ISA_avx2)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// low, high: a and b interleaved, a[0] b[0] a[1] b[1] …
inline __attribute__((always_inline)) void interleave(Vec a, Vec b, Vec& low, Vec& high) {
#if defined(LLMDPD_ISA_avx512)
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  low = (Vec)_mm512_permutex2var_ps((__m512)a, first, (__m512)b);
  high = (Vec)_mm512_permutex2var_ps((__m512)a, second, (__m512)b);
#elif defined(LLMDPD_ISA_avx2)
  const __m256 even = _mm256_unpacklo_ps((__m256)a, (__m256)b), odd = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  low = (Vec)_mm256_permute2f128_ps(even, odd, 0x20);
  high = (Vec)_mm256_permute2f128_ps(even, odd, 0x31);
#else
  low = Vec{a[0], b[0], a[1], b[1]};
  high = Vec{a[2], b[2], a[3], b[3]};
#endif
}

// A square block in place: interleaving row i with row i + kWidth / 2 is a rotation of the index bits by one, and
// log2(kWidth) of them swap rows and columns.
inline __attribute__((always_inline)) void transpose(Vec rows[kWidth]) {
#pragma GCC unroll 4
  for (int stage = 1; stage < kWidth; stage *= 2) {
    Vec next[kWidth];
#pragma GCC unroll 8
    for (int i = 0; i < kWidth / 2; ++i) interleave(rows[i], rows[i + kWidth / 2], next[2 * i], next[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) rows[i] = next[i];
  }
}

// e^x for x <= 40; below -87, where the result would be denormal, 0. A NaN stays one where x does.
inline __attribute__((always_inline)) Vec exp_bounded(Vec x) {
  const Vec round_magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const Vec shifted = fma(x, broadcast(1.44269504f), round_magic);
  const Vec n = shifted - round_magic;
  // ln 2 in two parts, so that x - n ln 2 is exact enough.
  Vec r = fma(n, broadcast(-0.693145752f), x);
  r = fma(n, broadcast(-1.42860677e-6f), r);
  Vec poly = broadcast(1.0f / 5040);
  poly = fma(poly, r, broadcast(1.0f / 720));
  poly = fma(poly, r, broadcast(1.0f / 120));
  poly = fma(poly, r, broadcast(1.0f / 24));
  poly = fma(poly, r, broadcast(1.0f / 6));
  poly = fma(poly, r, broadcast(0.5f));
  poly = fma(poly, r, broadcast(1.0f));
  poly = fma(poly, r, broadcast(1.0f));
  const Vec power = (Vec)(((IntVec)shifted + 127) << 23);
  return x < broadcast(-87.0f) ? Vec{} : poly * power;
}

// 1 / x for a normal positive x; in float32 to the last bit or two.
inline __attribute__((always_inline)) Vec reciprocal(Vec x) {
#if defined(LLMDPD_ISA_avx512)
  // 14 bits by table and a step of Newton's: less than half of the division's time.
  const Vec estimate = (Vec)_mm512_rcp14_ps((__m512)x);
  return fma(estimate, fma(-x, estimate, broadcast(1.0f)), estimate);
#else
  return broadcast(1.0f) / x;
#endif
}

// mish(x) = x tanh(ln(1 + e^x)) = x n / (n + 2), n = e^x (e^x + 2). From x = 20 on the ratio is 1 in float32, and
// capping x there keeps n finite.
inline __attribute__((always_inline)) Vec mish(Vec x) {
  const Vec cap = broadcast(20.0f);
  const Vec e = exp_bounded(x > cap ? cap : x);
  const Vec n = e * (e + broadcast(2.0f));
  return x * (n * reciprocal(n + broadcast(2.0f)));
}

// mish(x), and its derivative n / (n + 2) + 4 x e (e + 1) / (n + 2)^2.
inline __attribute__((always_inline)) Vec mish(Vec x, Vec& derivative) {
  const Vec cap = broadcast(20.0f);
  const Vec e = exp_bounded(x > cap ? cap : x);
  const Vec n = e * (e + broadcast(2.0f));
  const Vec r = reciprocal(n + broadcast(2.0f));
  const Vec ratio = n * r;
  derivative = fma(broadcast(4.0f) * x * r, e * (e + broadcast(1.0f)) * r, ratio);
  return x * ratio;
}

}  // namespace
