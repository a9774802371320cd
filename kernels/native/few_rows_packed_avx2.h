// The product for AVX2 of few rows and packed weights (fxq/kernels/gemm/panels.py), which are unpacked as they are loaded.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "product.h"
#include "tile_avx2.h"
#include "vectors.h"

namespace fxq {

constexpr long PACKED_AHEAD = 4096;  // bytes of a panel that are fetched before they are read

// Two steps of 8 columns, -8..7.
struct TwoSteps {
  __m256i first, second;

  explicit TwoSteps(const uint8_t* p) {
    const __m256i w = load_bytes(p), half = _mm256_set1_epi8(15), eight = _mm256_set1_epi8(8);
    first = _mm256_sub_epi8(_mm256_and_si256(w, half), eight);
    second = _mm256_sub_epi8(_mm256_and_si256(_mm256_srli_epi16(w, 4), half), eight);
  }
};

// sums [R][TILE_COLUMNS] += rows [R][depth] * steps of 8 * V columns. Eight steps add up in int16: 8 * 2 * 255 * 8 = 32640.
template <int R, int V>
void multiply_few_packed(const uint8_t* rows, long depth, const uint8_t* panel, long steps, int32_t* sums) {
  constexpr long ROW = 4 * TILE_COLUMNS, GROUP = 8;
  const __m256i ones = _mm256_set1_epi16(1);
  for (long k = 0; k < steps; k += GROUP) {
    __m256i parts[R][V];
    FXQ_UNROLL for (int i = 0; i < R; i++) {
      FXQ_UNROLL for (int j = 0; j < V; j++) parts[i][j] = _mm256_setzero_si256();
    }
    const long last = std::min(k + GROUP, steps);
    for (long step = k; step < last; step += 2, panel += ROW) {
      FXQ_UNROLL for (int j = 0; j < V; j += 2) _mm_prefetch(reinterpret_cast<const char*>(panel + 32 * j + PACKED_AHEAD), _MM_HINT_T0);
      FXQ_UNROLL for (int j = 0; j < V; j++) {
        const TwoSteps w(panel + 32 * j);
        FXQ_UNROLL for (int i = 0; i < R; i++) {
          const uint8_t* from = rows + i * depth + 4 * step;
          add_bytes_narrow(parts[i][j], broadcast(from), w.first);
          add_bytes_narrow(parts[i][j], broadcast(from + 4), w.second);
        }
      }
    }
    FXQ_UNROLL for (int i = 0; i < R; i++) {
      FXQ_UNROLL for (int j = 0; j < V; j++) {
        int32_t* to = sums + i * TILE_COLUMNS + 8 * j;
        __m256i sum = load_ints(to);
        add_words(sum, parts[i][j], ones);
        store_bytes(to, sum);
      }
    }
  }
}

// All 64 columns of up to 5 rows; `steps` are even.
template <int R>
void multiply_few_packed(const uint8_t* rows, long depth, const uint8_t* panel, long steps, int32_t* sums) {
  constexpr int V = R == 1 ? 8 : R == 2 ? 4 : 2;  // 10 parts at most
  for (int column = 0; column < TILE_COLUMNS; column += 8 * V) {
    multiply_few_packed<R, V>(rows, depth, panel + 4 * column, steps, sums + column);
  }
}

inline void multiply_few_packed(const uint8_t* a, long depth, long rows, const uint8_t* panel, long steps, int32_t* sums) {
  switch (rows) {
    case 5: return multiply_few_packed<5>(a, depth, panel, steps, sums);
    case 4: return multiply_few_packed<4>(a, depth, panel, steps, sums);
    case 3: return multiply_few_packed<3>(a, depth, panel, steps, sums);
    case 2: return multiply_few_packed<2>(a, depth, panel, steps, sums);
    default: return multiply_few_packed<1>(a, depth, panel, steps, sums);
  }
}

}  // namespace fxq
