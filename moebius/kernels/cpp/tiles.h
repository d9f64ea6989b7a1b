// Products of small matrices in fp32, in tiles that the registers of a core hold.

#pragma once

#include <cstdint>

namespace moebius {

#if defined(__AVX512F__)
constexpr int64_t lanes = 16, tile_rows = 8;
#elif defined(__AVX__)
constexpr int64_t lanes = 8, tile_rows = 4;
#else
constexpr int64_t lanes = 4, tile_rows = 8;
#endif
constexpr int64_t tile_columns = 2 * lanes;

using Vector = float __attribute__((vector_size(lanes * sizeof(float))));
using Unaligned = float
    __attribute__((vector_size(lanes * sizeof(float)), aligned(alignof(float)), may_alias));

inline Vector read(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void write(float* to, Vector x) { *reinterpret_cast<Unaligned*>(to) = x; }

constexpr int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

// Elements some memory apart from row to row and from column to column.
struct Matrix {
  float* data;
  int64_t row_step, column_step = 1;

  float* row(int64_t r) const { return data + r * row_step; }
  Matrix from(int64_t r, int64_t c) const {
    return {data + r * row_step + c * column_step, row_step, column_step};
  }
  Matrix transposed() const { return {data, column_step, row_step}; }
};

// `tile_rows` by `tile_columns` of c = a b, or of c += a b. Rows of b and c lie in one piece.
template <bool add>
inline void multiply_tile(Matrix a, Matrix b, Matrix c, int64_t depth) {
  Vector left[tile_rows], right[tile_rows];
#pragma GCC unroll 8
  for (int64_t r = 0; r < tile_rows; ++r) {
    left[r] = add ? read(c.row(r)) : Vector{};
    right[r] = add ? read(c.row(r) + lanes) : Vector{};
  }
  for (int64_t k = 0; k < depth; ++k, a.data += a.column_step, b.data += b.row_step) {
    const Vector b_left = read(b.data), b_right = read(b.data + lanes);
#pragma GCC unroll 8
    for (int64_t r = 0; r < tile_rows; ++r) {
      left[r] += *a.row(r) * b_left;
      right[r] += *a.row(r) * b_right;
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < tile_rows; ++r) {
    write(c.row(r), left[r]);
    write(c.row(r) + lanes, right[r]);
  }
}

}  // namespace moebius
