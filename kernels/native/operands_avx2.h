// Operands of attention for AVX2: float32 one by one, and int16 in pairs; see operands.h.
//
// Codes are widened to int16: bytes would saturate in pairs (255 * 127 * 2 is more than 32767). A panel is
// four tiles of 16 columns, one after the other.
#pragma once

#include "product.h"
#include "tile_avx2.h"
#include "vectors.h"

namespace fxq {

constexpr long QUERY_ROWS = 96;  // of a block

// 16 columns. Functions of their own: inside of others compilers keep the sums in memory.
template <bool ADD>
[[gnu::noinline]] void multiply_float_tile(const float* a, long stride, const float* b, long steps, float* c, long c_stride) {
  Floats sums[TILE_ROWS][2];
  FXQ_UNROLL for (int i = 0; i < TILE_ROWS; i++) {
    FXQ_UNROLL for (int j = 0; j < 2; j++) sums[i][j] = ADD ? load(c + i * c_stride + 8 * j) : floats(0);
  }
  for (long k = 0; k < steps; k++) {
    const Floats b0 = load(b + 16 * k), b1 = load(b + 16 * k + 8);
    FXQ_UNROLL for (int i = 0; i < TILE_ROWS; i++) {
      const Floats v = _mm256_broadcast_ss(a + i * stride + k);
      sums[i][0] = fmadd(v, b0, sums[i][0]);
      sums[i][1] = fmadd(v, b1, sums[i][1]);
    }
  }
  FXQ_UNROLL for (int i = 0; i < TILE_ROWS; i++) {
    FXQ_UNROLL for (int j = 0; j < 2; j++) store(c + i * c_stride + 8 * j, sums[i][j]);
  }
}

[[gnu::noinline]] inline void multiply_word_tile(const int16_t* a, long stride, const int16_t* b, long steps, int32_t* c, long c_stride) {
  Ints sums[TILE_ROWS][2];
  FXQ_UNROLL for (int i = 0; i < TILE_ROWS; i++) {
    FXQ_UNROLL for (int j = 0; j < 2; j++) sums[i][j] = ints(0);
  }
  for (long k = 0; k < steps; k++) {
    const Ints b0 = load_bytes(b + 32 * k), b1 = load_bytes(b + 32 * k + 16);
    FXQ_UNROLL for (int i = 0; i < TILE_ROWS; i++) {
      const Ints v = broadcast(a + i * stride + 2 * k);
      add_words(sums[i][0], v, b0);
      add_words(sums[i][1], v, b1);
    }
  }
  FXQ_UNROLL for (int i = 0; i < TILE_ROWS; i++) {
    FXQ_UNROLL for (int j = 0; j < 2; j++) store_bytes(c + i * c_stride + 8 * j, sums[i][j]);
  }
}

struct FloatOperands {
  using Number = float;
  using Row = float;
  using Sum = float;
  static constexpr int EACH = 1;
  static constexpr long ROWS = TILE_ROWS, STEPS = 1;
  struct Session {};

  static Floats exp(Floats x) { return fxq::exp(x); }

  static long place(long steps, long step, long column) { return 16 * (column / 16 * steps + step) + column % 16; }
  static void multiply(const Row* a, long stride, const Number* b, long steps, Sum* c, long c_stride) {
    tiles<false>(a, stride, b, steps, c, c_stride);
  }
  static void add_multiply(const Row* a, long stride, const Number* b, long steps, Sum* c, long c_stride) {
    tiles<true>(a, stride, b, steps, c, c_stride);
  }
  static void interleave(const Row* rows, long, Number* to) { fxq::store(to, load(rows)); }

 private:
  template <bool ADD>
  static void tiles(const Row* a, long stride, const Number* b, long steps, Sum* c, long c_stride) {
    for (int tile = 0; tile < TILE_COLUMNS / 16; tile++, b += 16 * steps, c += 16) {
      multiply_float_tile<ADD>(a, stride, b, steps, c, c_stride);
    }
  }
};

struct CodeOperands {
  using Number = int16_t;
  using Row = int16_t;
  using Sum = int32_t;
  static constexpr int EACH = 2;
  static constexpr int OFFSET = 0;
  static constexpr long ROWS = TILE_ROWS, STEPS = 1, PARTS = 1;
  struct Session {};

  static long place(long steps, long step, long column) {
    return EACH * (16 * (column / 16 * steps + step) + column % 16);
  }
  static void multiply(const Row* a, long stride, const Number* b, long steps, Sum* c, long c_stride) {
    for (int tile = 0; tile < TILE_COLUMNS / 16; tile++, b += 32 * steps, c += 16) {
      multiply_word_tile(a, stride, b, steps, c, c_stride);
    }
  }
  static void interleave(const Ints codes[EACH], Number* to) {
    store_bytes(to, _mm256_or_si256(_mm256_and_si256(codes[0], ints(0xFFFF)), _mm256_slli_epi32(codes[1], 16)));
  }
  static void put_weights(Row* to, long, Ints weights) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(weights), _mm256_extracti128_si256(weights, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), words);
  }
};

using WeightOperands = CodeOperands;

}  // namespace fxq
