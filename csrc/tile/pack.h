// Weight matrices into packed tiles.
#pragma once

#include "lanes.h"

namespace {

// Up to kWidth numbers, zero beyond `count`.
inline Vec load_some(const float* from, int count) {
  if (count >= kWidth) return load(from);
  float buffer[kWidth] = {};
  for (int i = 0; i < count; ++i) buffer[i] = from[i];
  return load(buffer);
}

template <class Op>
void pack_plain(const float* weights, std::ptrdiff_t stride, int outputs, int inputs, float* packed_tiles) {
  constexpr int per_lane = Op::kPerLane;
  const int lanes = (inputs + per_lane - 1) / per_lane;
  for (int first = 0; first < outputs; first += kWidth) {
    const float* from = weights + first * stride;
    float* to = packed_tiles + static_cast<std::ptrdiff_t>(first) * lanes;
    const int count = outputs - first < kWidth ? outputs - first : kWidth;
    int k = 0;
    for (; count == kWidth && (k + kWidth) * per_lane <= inputs; k += kWidth) {
      Vec square[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) square[i] = Op::load_lanes(from + i * stride + k * per_lane);
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) store(to + (k + i) * kWidth, square[i]);
    }
    for (; k < lanes; ++k) {
      for (int i = 0; i < kWidth; ++i) {
        const int column = k * per_lane;
        const float one = i < count ? from[i * stride + column] : 0.0f;
        const float two = i < count && column + 1 < inputs ? from[i * stride + column + 1] : 0.0f;
        to[k * kWidth + i] = Op::lane(one, two);
      }
    }
  }
}

template <class Op>
void pack_transposed(const float* weights, std::ptrdiff_t stride, int outputs, int inputs, float* packed_tiles) {
  constexpr int per_lane = Op::kPerLane;
  const int lanes = (outputs + per_lane - 1) / per_lane;
  for (int first = 0; first < inputs; first += kWidth) {
    float* to = packed_tiles + static_cast<std::ptrdiff_t>(first) * lanes;
    const int count = inputs - first;
    int o = 0;
    for (; o + 2 <= outputs; o += 2) {
      const float* from = weights + o * stride + first;
      Op::store_rows(to, o, load_some(from, count), load_some(from + stride, count));
    }
    if (o < outputs) {
      float buffer[2 * kWidth];
      Op::store_rows(buffer, 0, load_some(weights + o * stride + first, count), Vec{});
      store(to + o / per_lane * kWidth, load(buffer));
    }
  }
}

void pack(const float* weights, std::ptrdiff_t stride, int outputs, int inputs, bool transposed, bool in_lanes,
          float* packed_tiles) {
  if (transposed) {
    (in_lanes ? pack_transposed<Trunk> : pack_transposed<Single>)(weights, stride, outputs, inputs, packed_tiles);
  } else {
    (in_lanes ? pack_plain<Trunk> : pack_plain<Single>)(weights, stride, outputs, inputs, packed_tiles);
  }
}

}  // namespace
