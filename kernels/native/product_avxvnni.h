// The product for AVX VNNI, the 256-bit vpdpbusd of CPUs without AVX512: exact for any int8 weights, since four products
// are added in 32 bits. A block of a panel is read as it lies and stays in the first-level cache while all rows go over
// it.
#pragma once

#include <immintrin.h>

#include "packed_rows.h"
#include "product.h"
#include "tile_avx2.h"
#include "vectors.h"

namespace fxq {

// Up to R rows times 8 * V columns with all sums in registers: c [R][TILE_COLUMNS] += a [steps][R][4] * b
// [steps][TILE_COLUMNS][4]. Sums wrap, see product.h.
template <int R, int V>
void multiply_bytes(const uint8_t* a, const int8_t* b, long steps, int32_t* c) {
  __m256i sums[R][V];
  FXQ_UNROLL for (int i = 0; i < R; i++) {
    FXQ_UNROLL for (int j = 0; j < V; j++) sums[i][j] = load_ints(c + i * TILE_COLUMNS + 8 * j);
  }
  for (long k = 0; k < steps; k++, a += 4 * R, b += 4 * TILE_COLUMNS) {
    __m256i w[V];
    FXQ_UNROLL for (int j = 0; j < V; j++) w[j] = load_bytes(b + 32 * j);
    FXQ_UNROLL for (int i = 0; i < R; i++) {
      const __m256i v = broadcast(a + 4 * i);
      FXQ_UNROLL for (int j = 0; j < V; j++) sums[i][j] = _mm256_dpbusd_avx_epi32(sums[i][j], v, w[j]);
    }
  }
  FXQ_UNROLL for (int i = 0; i < R; i++) {
    FXQ_UNROLL for (int j = 0; j < V; j++) store_bytes(c + i * TILE_COLUMNS + 8 * j, sums[i][j]);
  }
}

class Product {
 public:
  static constexpr double LEAST_WORK = 1 << 22;
  static constexpr long ROWS = TILE_ROWS;

  // Their bytes stay in the second-level cache, and so do their sums.
  static long most_rows(const Segments& s) { return std::max(192L, std::min(768L, (800L << 10) / std::max(1L, 4 * s.steps()))); }

  Product(const Linear& p, const Segments& s, long begin, long end) : s_(s), begin_(begin), rows_(end - begin) {
    static thread_local Scratch row_scratch, sum_scratch;
    bytes_ = row_scratch.get<uint8_t>(rows_ * depth());
    sums_ = sum_scratch.get<int32_t>((s.outlier ? 2 : 1) * rows_ * TILE_COLUMNS);
    pack_rows<0x80808080u>(p, s, begin, rows_, bytes_);
  }

  template <typename Done>
  void multiply(const int8_t* panel, Done done) const {
    int32_t* outlier = s_.outlier ? sums_ + rows_ * TILE_COLUMNS : nullptr;
    multiply_segment(panel, 0, s_.normal, sums_);
    if (outlier != nullptr) multiply_segment(panel, s_.normal, s_.steps(), outlier);
    for (long row = 0; row < rows_; row += DONE_ROWS) {
      const int height = static_cast<int>(std::min(DONE_ROWS, rows_ - row));
      done(begin_ + row, height, sums_ + row * TILE_COLUMNS, outlier ? outlier + row * TILE_COLUMNS : nullptr);
    }
  }

 private:
  static constexpr long BLOCK_STEPS = 96;  // 24 KB of a panel
  static constexpr long DONE_ROWS = 24;    // whose results stay in the first-level cache while all their columns are written

  long depth() const { return 4 * s_.steps(); }

  // sums [rows, TILE_COLUMNS] of the steps from `first` to `last`.
  void multiply_segment(const int8_t* panel, long first, long last, int32_t* sums) const {
    std::memset(sums, 0, rows_ * TILE_COLUMNS * sizeof(int32_t));
    for (long k = first; k < last; k += BLOCK_STEPS) {
      const long steps = std::min(BLOCK_STEPS, last - k);
      const int8_t* from = panel + 4 * TILE_COLUMNS * k;
      for (long tile = 0; tile < rows_; tile += TILE_ROWS) {
        const long height = tile_height(rows_, tile);
        const uint8_t* a = bytes_ + tile * depth() + 4 * k * height;
        int32_t* c = sums + tile * TILE_COLUMNS;
        switch (height) {
          case 6: multiply_tile<6, 2>(a, from, steps, c); break;
          case 5: multiply_tile<5, 2>(a, from, steps, c); break;
          case 4: multiply_tile<4, 2>(a, from, steps, c); break;
          case 3: multiply_tile<3, 4>(a, from, steps, c); break;
          case 2: multiply_tile<2, 4>(a, from, steps, c); break;
          default: multiply_tile<1, 8>(a, from, steps, c);
        }
      }
    }
  }

  // All 64 columns.
  template <int R, int V>
  static void multiply_tile(const uint8_t* a, const int8_t* b, long steps, int32_t* c) {
    for (int column = 0; column < TILE_COLUMNS; column += 8 * V) multiply_bytes<R, V>(a, b + 4 * column, steps, c + column);
  }

  Segments s_;
  long begin_, rows_;
  uint8_t* bytes_;
  int32_t* sums_;
};

}  // namespace fxq
