// The inner loops of the product for AVX VNNI, the 256-bit vpdpbusd of CPUs without AVX512; see tiled_product.h. Exact for
// any int8 weights, since four products are added in 32 bits. Weights are read as they lie in a panel.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "tile_avx2.h"
#include "vectors.h"

namespace fxq {

// R rows times 8 * V columns with all sums in registers.
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

struct ProductTile {
  static constexpr int OFFSET = 128;
  static constexpr long STEPS = 1, HEIGHT = 1;

  template <int R>
  static void multiply(const uint8_t* a, const int8_t* b, long steps, int32_t* c) {
    constexpr int V = R == 1 ? 8 : R <= 3 ? 4 : 2;  // 12 sums at most
    for (int j = 0; j < TILE_COLUMNS; j += 8 * V) multiply_bytes<R, V>(a, b + 4 * j, steps, c + j);
  }
};

}  // namespace fxq
