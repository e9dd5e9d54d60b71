// What the trunk's matrix products are computed in. Operands lie in 32-bit lanes: one float each in fp32; two bfloat16
// of neighbouring k each where the CPU multiplies those pairs; one float rounded to bfloat16 each where it doesn't, so
// that `bf16` means the same numbers (but for the order of sums) on every CPU.
#pragma once

#include <cstddef>

#include "simd.h"

namespace {

// fp32 products, whatever the precision of the trunk: the first layer's small inputs.
struct Single {
  static constexpr int kPerLane = 1;
  static inline __attribute__((always_inline)) Vec multiply_add(float lane, Vec weights, Vec sum) {
    return fma(broadcast(lane), weights, sum);
  }
  static inline __attribute__((always_inline)) void store_lanes(float* row, std::ptrdiff_t column, Vec value) {
    store(row + column, value);
  }
  static inline __attribute__((always_inline)) void store_rows(float* packed_tile, std::ptrdiff_t row, Vec first,
                                                               Vec second) {
    store(packed_tile + row * kWidth, first);
    store(packed_tile + (row + 1) * kWidth, second);
  }
  // kWidth lanes from consecutive numbers.
  static inline __attribute__((always_inline)) Vec load_lanes(const float* numbers) { return load(numbers); }
  static inline float lane(float first, float) { return first; }
};

// To the nearest bfloat16, ties to even; a NaN stays one.
inline __attribute__((always_inline)) Vec round_to_bf16(Vec x) {
  const IntVec bits = (IntVec)x;
  const IntVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & (int)0xffff0000;
  return x == x ? (Vec)rounded : x;
}

inline unsigned bf16_bits(float x) {
  unsigned bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  if (x != x) return 0x7fc0;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

#if !defined(LLMDPD_BF16)
using Trunk = Single;
#elif defined(__AVX512BF16__)
struct Trunk {
  static constexpr int kPerLane = 2;
  static inline __attribute__((always_inline)) Vec multiply_add(float lane, Vec weights, Vec sum) {
    const Vec pair = broadcast_bits(lane);
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pair, (__m512bh)weights);
  }
  // Columns column … column + 15 of one row: pairs along the row.
  static inline __attribute__((always_inline)) void store_lanes(float* row, std::ptrdiff_t column, Vec value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + column / 2), (__m256i)_mm512_cvtneps_pbh((__m512)value));
  }
  // Rows `row` (even) and row + 1: pairs across the rows.
  static inline __attribute__((always_inline)) void store_rows(float* packed_tile, std::ptrdiff_t row, Vec first,
                                                               Vec second) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)first));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)second));
    store(packed_tile + row / 2 * kWidth, (Vec)_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  static inline __attribute__((always_inline)) Vec load_lanes(const float* numbers) {
    const __m512 low = (__m512)load(numbers), high = (__m512)load(numbers + kWidth);
    return (Vec)(__m512i)_mm512_cvtne2ps_pbh(high, low);
  }
  static inline float lane(float first, float second) {
    const unsigned bits = bf16_bits(first) | bf16_bits(second) << 16;
    float packed;
    __builtin_memcpy(&packed, &bits, sizeof packed);
    return packed;
  }

 private:
  // Not by arithmetic, as `broadcast`: the lane is no number.
  static inline __attribute__((always_inline)) Vec broadcast_bits(float lane) { return (Vec)_mm512_set1_ps(lane); }
};
#else
struct Trunk : Single {
  static inline __attribute__((always_inline)) void store_lanes(float* row, std::ptrdiff_t column, Vec value) {
    store(row + column, round_to_bf16(value));
  }
  static inline __attribute__((always_inline)) void store_rows(float* packed_tile, std::ptrdiff_t row, Vec first,
                                                               Vec second) {
    Single::store_rows(packed_tile, row, round_to_bf16(first), round_to_bf16(second));
  }
  static inline __attribute__((always_inline)) Vec load_lanes(const float* numbers) {
    return round_to_bf16(load(numbers));
  }
  static inline float lane(float first, float) {
    const unsigned bits = bf16_bits(first) << 16;
    float rounded;
    __builtin_memcpy(&rounded, &bits, sizeof rounded);
    return rounded;
  }
};
#endif

// Lanes that `count` numbers take along k.
constexpr std::ptrdiff_t lanes_for(std::ptrdiff_t count) { return (count + Trunk::kPerLane - 1) / Trunk::kPerLane; }

}  // namespace
