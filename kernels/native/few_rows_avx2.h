// The product for AVX2 of few rows, exact for any int8 weights: a panel is read once and as it lies, since laying it out
// would take longer than multiplying. Weights are widened to int16 as they are loaded, [4 columns][4 channels] a vector.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "product.h"
#include "tile_avx2.h"
#include "vectors.h"

namespace fxq {

constexpr long FEW_STEPS = 64;  // of a panel, 16 KB: in the first-level cache while all rows go over them

// pairs [R][TILE_COLUMNS][2] int32 += rows [R][depth] * steps of 4 * V columns; |255 * 128| * 2 fits int32.
template <int R, int V>
void multiply_few(const int16_t* rows, long depth, const int8_t* panel, long steps, int32_t* pairs) {
  __m256i sums[R][V];
  FXQ_UNROLL for (int i = 0; i < R; i++) {
    FXQ_UNROLL for (int j = 0; j < V; j++) sums[i][j] = load_ints(pairs + 2 * TILE_COLUMNS * i + 8 * j);
  }
  for (long k = 0; k < steps; k++, panel += 4 * TILE_COLUMNS) {
    // The same place of the next block.
    _mm_prefetch(reinterpret_cast<const char*>(panel + FEW_STEPS * 4 * TILE_COLUMNS), _MM_HINT_T0);
    if (V > 4) _mm_prefetch(reinterpret_cast<const char*>(panel + FEW_STEPS * 4 * TILE_COLUMNS + 64), _MM_HINT_T0);
    FXQ_UNROLL for (int j = 0; j < V; j++) {
      const __m256i w = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(panel + 16 * j)));
      FXQ_UNROLL for (int i = 0; i < R; i++) {
        int64_t four;
        std::memcpy(&four, rows + i * depth + 4 * k, sizeof(four));
        add_words(sums[i][j], _mm256_set1_epi64x(four), w);
      }
    }
  }
  FXQ_UNROLL for (int i = 0; i < R; i++) {
    FXQ_UNROLL for (int j = 0; j < V; j++) store_bytes(pairs + 2 * TILE_COLUMNS * i + 8 * j, sums[i][j]);
  }
}

// All 64 columns.
template <int R>
void multiply_few(const int16_t* rows, long depth, const int8_t* panel, long steps, int32_t* pairs) {
  constexpr int V = R == 1 ? 8 : R <= 3 ? 4 : 2;  // 12 sums at most
  for (int column = 0; column < TILE_COLUMNS; column += 4 * V) {
    multiply_few<R, V>(rows, depth, panel + 4 * column, steps, pairs + 2 * column);
  }
}

// sums [rows, TILE_COLUMNS] = rows * panel. `pairs` is memory for [rows][TILE_COLUMNS][2].
inline void multiply_few_rows(const int16_t* a, long depth, long rows, const int8_t* panel, long steps, int32_t* pairs, int32_t* sums) {
  std::memset(pairs, 0, 2 * TILE_COLUMNS * rows * sizeof(int32_t));
  for (long k = 0; k < steps; k += FEW_STEPS, panel += FEW_STEPS * 4 * TILE_COLUMNS) {
    const long count = std::min(FEW_STEPS, steps - k);
    for (long row = 0; row < rows; row += TILE_ROWS) {
      const int16_t* from = a + row * depth + 4 * k;
      int32_t* to = pairs + 2 * TILE_COLUMNS * row;
      switch (std::min<long>(TILE_ROWS, rows - row)) {
        case 6: multiply_few<6>(from, depth, panel, count, to); break;
        case 5: multiply_few<5>(from, depth, panel, count, to); break;
        case 4: multiply_few<4>(from, depth, panel, count, to); break;
        case 3: multiply_few<3>(from, depth, panel, count, to); break;
        case 2: multiply_few<2>(from, depth, panel, count, to); break;
        default: multiply_few<1>(from, depth, panel, count, to);
      }
    }
  }
  for (long i = 0; i < rows * TILE_COLUMNS; i += 8) {
    const __m256i both = _mm256_hadd_epi32(load_ints(pairs + 2 * i), load_ints(pairs + 2 * i + 8));
    store_bytes(sums + i, _mm256_permute4x64_epi64(both, 0xD8));
  }
}

}  // namespace fxq
