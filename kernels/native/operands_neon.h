// Operands of attention for AArch64: float32 one by one, bytes in fours (sdot), and int16 one by one; see operands.h. A panel
// is four tiles of 16 columns, one after the other.
#pragma once

#include <arm_neon.h>

#include "product.h"
#include "vectors.h"

namespace fxq {

constexpr long QUERY_ROWS = 96;  // of a block

// 16 columns. Functions of their own: inside of others compilers keep the sums in memory.
template <bool ADD>
[[gnu::noinline]] void multiply_float_tile(const float* a, long stride, const float* b, long steps, float* c, long c_stride) {
  float32x4_t sums[TILE_ROWS][4];
  FXQ_UNROLL for (int i = 0; i < TILE_ROWS; i++) {
    FXQ_UNROLL for (int j = 0; j < 4; j++) sums[i][j] = ADD ? vld1q_f32(c + i * c_stride + 4 * j) : vdupq_n_f32(0);
  }
  for (long k = 0; k < steps; k++) {
    float32x4_t w[4];
    FXQ_UNROLL for (int j = 0; j < 4; j++) w[j] = vld1q_f32(b + 16 * k + 4 * j);
    FXQ_UNROLL for (int i = 0; i < TILE_ROWS; i++) {
      const float v = a[i * stride + k];
      FXQ_UNROLL for (int j = 0; j < 4; j++) sums[i][j] = vfmaq_n_f32(sums[i][j], w[j], v);
      asm volatile("" ::: "memory");  // or compilers load all rows first and spill sums
    }
  }
  FXQ_UNROLL for (int i = 0; i < TILE_ROWS; i++) {
    FXQ_UNROLL for (int j = 0; j < 4; j++) vst1q_f32(c + i * c_stride + 4 * j, sums[i][j]);
  }
}

// c of 16 columns = what `add(sums, weights, row, k)` adds up to a row for every step k.
template <typename Row, typename Number, typename Load, typename Add>
inline void sum_integers(const Row* a, long stride, const Number* b, long steps, int32_t* c, long c_stride, Load weights, Add add) {
  int32x4_t sums[TILE_ROWS][4];
  FXQ_UNROLL for (int i = 0; i < TILE_ROWS; i++) {
    FXQ_UNROLL for (int j = 0; j < 4; j++) sums[i][j] = vdupq_n_s32(0);
  }
  for (long k = 0; k < steps; k++) {
    const auto w = weights(b, k);
    FXQ_UNROLL for (int i = 0; i < TILE_ROWS; i++) {
      add(sums[i], w, a + i * stride, k);
      asm volatile("" ::: "memory");
    }
  }
  FXQ_UNROLL for (int i = 0; i < TILE_ROWS; i++) {
    FXQ_UNROLL for (int j = 0; j < 4; j++) vst1q_s32(c + i * c_stride + 4 * j, sums[i][j]);
  }
}

[[gnu::noinline]] inline void multiply_code_tile(const int8_t* a, long stride, const int8_t* b, long steps, int32_t* c, long c_stride) {
  const auto weights = [](const int8_t* b, long k) { return vld1q_s8_x4(b + 64 * k); };
  sum_integers(a, stride, b, steps, c, c_stride, weights, [](int32x4_t sums[4], const int8x16x4_t& w, const int8_t* row, long k) {
    int32_t four;
    std::memcpy(&four, row + 4 * k, sizeof(four));
    FXQ_UNROLL for (int j = 0; j < 4; j++) sums[j] = vdotq_s32(sums[j], w.val[j], vreinterpretq_s8_s32(vdupq_n_s32(four)));
  });
}

[[gnu::noinline]] inline void multiply_word_tile(const int16_t* a, long stride, const int16_t* b, long steps, int32_t* c, long c_stride) {
  const auto weights = [](const int16_t* b, long k) { return vld1q_s16_x2(b + 16 * k); };
  sum_integers(a, stride, b, steps, c, c_stride, weights, [](int32x4_t sums[4], const int16x8x2_t& w, const int16_t* row, long k) {
    FXQ_UNROLL for (int j = 0; j < 2; j++) {
      sums[2 * j] = vmlal_n_s16(sums[2 * j], vget_low_s16(w.val[j]), row[k]);
      sums[2 * j + 1] = vmlal_n_s16(sums[2 * j + 1], vget_high_s16(w.val[j]), row[k]);
    }
  });
}

// Where a column's step lies in a panel, and what is done for each of its tiles.
template <int NUMBERS>
struct Tiles {
  static constexpr int EACH = NUMBERS;
  static constexpr long ROWS = TILE_ROWS, STEPS = 1;
  struct Session {};

  static long place(long steps, long step, long column) {
    return EACH * (16 * (column / 16 * steps + step) + column % 16);
  }
  template <typename Number, typename Sum, typename F>
  static void each(const Number* b, long steps, Sum* c, F multiply) {
    for (int tile = 0; tile < TILE_COLUMNS / 16; tile++, b += 16 * EACH * steps, c += 16) multiply(b, c);
  }
};

struct FloatOperands : Tiles<1> {
  using Number = float;
  using Row = float;
  using Sum = float;

  static Floats exp(Floats x) { return fxq::exp(x); }

  static void multiply(const Row* a, long stride, const Number* b, long steps, Sum* c, long c_stride) {
    each(b, steps, c, [&](const Number* b, Sum* c) { multiply_float_tile<false>(a, stride, b, steps, c, c_stride); });
  }
  static void add_multiply(const Row* a, long stride, const Number* b, long steps, Sum* c, long c_stride) {
    each(b, steps, c, [&](const Number* b, Sum* c) { multiply_float_tile<true>(a, stride, b, steps, c, c_stride); });
  }
  static void interleave(const Row* rows, long, Number* to) { fxq::store(to, load(rows)); }
};

// |127 * 127| * 4 of a step is nothing to its int32 sum.
struct CodeOperands : Tiles<4> {
  using Number = int8_t;
  using Row = int8_t;
  using Sum = int32_t;
  static constexpr int OFFSET = 0;

  static void multiply(const Row* a, long stride, const Number* b, long steps, Sum* c, long c_stride) {
    each(b, steps, c, [&](const Number* b, Sum* c) { multiply_code_tile(a, stride, b, steps, c, c_stride); });
  }
};

struct WeightOperands : Tiles<1> {
  using Number = int16_t;
  using Row = int16_t;
  using Sum = int32_t;
  static constexpr long PARTS = 1;

  static void multiply(const Row* a, long stride, const Number* b, long steps, Sum* c, long c_stride) {
    each(b, steps, c, [&](const Number* b, Sum* c) { multiply_word_tile(a, stride, b, steps, c, c_stride); });
  }
  static void interleave(const Ints codes[EACH], Number* to) { vst1q_s16(to, to_words(codes[0])); }
  static void put_weights(Row* to, long, Ints weights) { vst1q_s16(to, to_words(weights)); }
};

}  // namespace fxq
