#include "peak_rate.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Compiled once for each instruction set, LLMDPD_ISA naming the namespace. As in simd.h, nothing of the standard library
// may be instantiated here: the linker could keep this object's copy for all.
namespace llmdpd::LLMDPD_ISA {
namespace {

// Enough independent sums to hide the latency of a multiply-add in both of a core's units, few enough to stay in
// registers beside the two factors.
#if defined(LLMDPD_ISA_avx512) || defined(LLMDPD_ISA_avx512bf16)
constexpr int kWidth = 16;
constexpr int kSums = 24;
#elif defined(LLMDPD_ISA_avx2)
constexpr int kWidth = 8;
constexpr int kSums = 12;
#elif defined(__aarch64__)
constexpr int kWidth = 4;
constexpr int kSums = 24;
#else
constexpr int kWidth = 4;
constexpr int kSums = 12;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth), may_alias));

#if defined(LLMDPD_ISA_avx512bf16)
constexpr double kPairs = 2.0;  // a bf16 dot product adds two products to each float
typedef __m512bh Factor;
inline __attribute__((always_inline)) Vec multiply_add(Vec sum, Factor a, Factor b) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, a, b);
}
inline Factor factor(float x) { return _mm512_cvtne2ps_pbh(_mm512_set1_ps(x), _mm512_set1_ps(x)); }
#else
constexpr double kPairs = 1.0;
typedef Vec Factor;
// sum = sum * a + b: with a + b = 1 the sums go to 1, away from overflow and from denormals.
inline __attribute__((always_inline)) Vec multiply_add(Vec sum, Factor a, Factor b) {
#if defined(LLMDPD_ISA_avx512)
  return (Vec)_mm512_fmadd_ps((__m512)sum, (__m512)a, (__m512)b);
#elif defined(LLMDPD_ISA_avx2)
  return (Vec)_mm256_fmadd_ps((__m256)sum, (__m256)a, (__m256)b);
#elif defined(__aarch64__)
  return (Vec)vfmaq_f32((float32x4_t)b, (float32x4_t)sum, (float32x4_t)a);
#else
  return sum * a + b;
#endif
}
inline Factor factor(float x) { return x - Vec{}; }
#endif

float run(std::int64_t rounds) {
  const Factor a = factor(0.999f), b = factor(0.001f);
  Vec sums[kSums];
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) sums[i] = static_cast<float>(i) - Vec{};
  for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) sums[i] = multiply_add(sums[i], a, b);
  }
  float total = 0.0f;
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) {
    for (int lane = 0; lane < kWidth; ++lane) total += sums[i][lane];
  }
  return total;
}

}  // namespace

extern const PeakLoop peak_loop;
const PeakLoop peak_loop = {2.0 * kPairs * kWidth * kSums, run};

}  // namespace llmdpd::LLMDPD_ISA
