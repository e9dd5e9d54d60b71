// The micro-kernel: sums of products of a few rows with a few vectors of outputs, all accumulators in registers.
#pragma once

#include "lanes.h"
#include "tile_kernels.h"

namespace {

constexpr int kMaxPackedTiles = 4;

// Few rows leave few accumulators, so they take more packed tiles at once, to hide the latency of a multiply-add. One
// row streams all weights from the second-level cache, which four packed tiles at once keep as busy as it can be; eight
// are more streams than prefetching follows (measured: 10 % slower).
constexpr int packed_tiles_at_once(int rows) { return rows <= 3 ? kMaxPackedTiles : 2; }

// Left operands: lane k of row r. A row is contiguous in k …
struct RowInput {
  const float* x;
  std::ptrdiff_t stride;
  inline __attribute__((always_inline)) float at(int r, std::ptrdiff_t k) const { return x[r * stride + k]; }
  RowInput from(int r) const { return {x + r * stride, stride}; }
};
// … or k's rows are contiguous (the sum of a weight gradient runs over the batch); step 0 repeats one number.
struct ColumnInput {
  const float* x;
  std::ptrdiff_t step;
  inline __attribute__((always_inline)) float at(int r, std::ptrdiff_t k) const { return x[k * step + r]; }
  ColumnInput from(int r) const { return {x + r, step}; }
};

// Right operands, in packed tiles [packed tile][lanes][kWidth].
struct PackedTiles {
  const float* lanes;
  std::ptrdiff_t packed_tile_lanes;  // from one packed tile to the next
  std::ptrdiff_t count;        // lanes along k
};

using llmdpd::PackedLayer;

inline PackedTiles packed_tiles_of(const PackedLayer& layer) {
  return {layer.packed_tiles, layer.lanes * kWidth, layer.lanes};
}

// What a sum starts from; stride 0 shares one row.
struct Init {
  const float* rows;
  std::ptrdiff_t stride;
  Init from(int r) const { return {rows + r * stride, stride}; }
};

// Where results go: as floats, or through Mish as lanes of a following product.
struct StoreFloat {
  float* rows;
  std::ptrdiff_t stride;
  inline __attribute__((always_inline)) void operator()(int r, std::ptrdiff_t column, Vec sum) const {
    store(rows + r * stride + column, sum);
  }
  StoreFloat from(int r) const { return {rows + r * stride, stride}; }
};
struct StoreMish {
  float* rows;
  std::ptrdiff_t stride;
  inline __attribute__((always_inline)) void operator()(int r, std::ptrdiff_t column, Vec sum) const {
    Trunk::store_lanes(rows + r * stride, column, mish(sum));
  }
  StoreMish from(int r) const { return {rows + r * stride, stride}; }
};

// result = init + left · right. Each output is one sum in the order of k, whatever the block's shape: that is what
// makes a row's result independent of its neighbours.
template <class Op, int rows, int packed_tiles, class Input, class Output>
inline __attribute__((always_inline)) void block(const PackedTiles& right, const Input& left, const Init& init,
                                                 const Output& output, std::ptrdiff_t column) {
  Vec sum[rows][packed_tiles];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < packed_tiles; ++p) sum[r][p] = load(init.rows + r * init.stride + column + p * kWidth);
  }
  for (std::ptrdiff_t k = 0; k < right.count; ++k) {
    Vec w[packed_tiles];
#pragma GCC unroll 8
    for (int p = 0; p < packed_tiles; ++p) w[p] = load(right.lanes + p * right.packed_tile_lanes + k * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const float x = left.at(r, k);
#pragma GCC unroll 8
      for (int p = 0; p < packed_tiles; ++p) sum[r][p] = Op::multiply_add(x, w[p], sum[r][p]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < packed_tiles; ++p) output(r, column + p * kWidth, sum[r][p]);
  }
}

constexpr int kNarrowRows = 6;

// A layer of one packed tile of outputs: a sum in four parts, k modulo 4, since one row alone has too few sums to hide
// the latency of a multiply-add. Always in four, so that this too does not depend on the block's shape.
template <class Op, int rows, class Input, class Output>
inline __attribute__((always_inline)) void narrow_block(const PackedTiles& right, const Input& left, const Init& init,
                                                        const Output& output) {
  Vec sum[4][rows];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    sum[0][r] = load(init.rows + r * init.stride);
    sum[1][r] = sum[2][r] = sum[3][r] = Vec{};
  }
  std::ptrdiff_t k = 0;
  for (; k + 4 <= right.count; k += 4) {
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      const Vec w = load(right.lanes + (k + part) * kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) sum[part][r] = Op::multiply_add(left.at(r, k + part), w, sum[part][r]);
    }
  }
  for (; k < right.count; ++k) {
    const Vec w = load(right.lanes + k * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) sum[0][r] = Op::multiply_add(left.at(r, k), w, sum[0][r]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) output(r, 0, (sum[0][r] + sum[1][r]) + (sum[2][r] + sum[3][r]));
}

template <class Op, int candidate = kNarrowRows, class Input, class Output>
void narrow(const PackedTiles& right, const Input& left, const Init& init, const Output& output, int rows) {
  if (rows >= candidate) {
    narrow_block<Op, candidate>(right, left, init, output);
    if (rows > candidate) {
      narrow<Op>(right, left.from(candidate), init.from(candidate), output.from(candidate), rows - candidate);
    }
  } else if constexpr (candidate > 1) {
    narrow<Op, candidate - 1>(right, left, init, output, rows);
  }
}

// `rows` rows by `packed tiles` packed tiles.
template <class Op, int rows, class Input, class Output>
void dense_rows(PackedTiles right, const Input& left, const Init& init, const Output& output, int packed_tiles) {
  constexpr int group = packed_tiles_at_once(rows);
  std::ptrdiff_t column = 0;
  for (; packed_tiles >= group;
       packed_tiles -= group, column += group * kWidth, right.lanes += group * right.packed_tile_lanes) {
    block<Op, rows, group>(right, left, init, output, column);
  }
  for (; packed_tiles > 0; --packed_tiles, column += kWidth, right.lanes += right.packed_tile_lanes) {
    block<Op, rows, 1>(right, left, init, output, column);
  }
}

// `rows` <= `candidate` rows, by the instance that is made for their number.
template <class Op, int candidate, class Input, class Output>
void dense(const PackedTiles& right, const Input& left, const Init& init, const Output& output, int rows,
           int packed_tiles) {
  if (rows == candidate) {
    dense_rows<Op, candidate>(right, left, init, output, packed_tiles);
  } else if constexpr (candidate > 1) {
    dense<Op, candidate - 1>(right, left, init, output, rows, packed_tiles);
  }
}

}  // namespace
