// The inner loop of the product for AArch64 with matrix products of int8 (smmla); see tiled_product.h.
//
// smmla multiplies two rows with two columns, eight channels each, and adds the products, of at most 2^14, in 32 bits
// without saturation: exact for any int8. Both factors are signed, so rows need no offset and the panels' sums of the
// weights are not subtracted. A panel has four channels of a column together: two steps are interleaved as they are read.
#pragma once

#include <arm_neon.h>

#include <cstdint>

#include "product.h"

namespace fxq {

// R rows, two by two, times 16 columns: up to 24 sums of 2 x 2, three pairs of rows and the weights in 32 registers.
template <int R>
class MatrixSums {
 public:
  explicit MatrixSums(const int32_t* c) {
    FXQ_UNROLL for (int i = 0; i < R / 2; i++) {
      FXQ_UNROLL for (int j = 0; j < 4; j++) {
        const int64x2_t first = vreinterpretq_s64_s32(vld1q_s32(c + 2 * i * TILE_COLUMNS + 4 * j));
        const int64x2_t second = vreinterpretq_s64_s32(vld1q_s32(c + (2 * i + 1) * TILE_COLUMNS + 4 * j));
        sums_[i][2 * j] = vreinterpretq_s32_s64(vzip1q_s64(first, second));
        sums_[i][2 * j + 1] = vreinterpretq_s32_s64(vzip2q_s64(first, second));
      }
    }
  }

  void store(int32_t* c) const {
    FXQ_UNROLL for (int i = 0; i < R / 2; i++) {
      FXQ_UNROLL for (int j = 0; j < 4; j++) {
        const int64x2_t left = vreinterpretq_s64_s32(sums_[i][2 * j]), right = vreinterpretq_s64_s32(sums_[i][2 * j + 1]);
        vst1q_s32(c + 2 * i * TILE_COLUMNS + 4 * j, vreinterpretq_s32_s64(vzip1q_s64(left, right)));
        vst1q_s32(c + (2 * i + 1) * TILE_COLUMNS + 4 * j, vreinterpretq_s32_s64(vzip2q_s64(left, right)));
      }
    }
  }

  // Two steps, or one and zeros.
  template <bool LAST>
  void add(const int8_t* a, const int8_t* b) {
    int8x16_t rows[R / 2];
    FXQ_UNROLL for (int i = 0; i < R / 2; i++) rows[i] = vld1q_s8(a + 16 * i);
    FXQ_UNROLL for (int j = 0; j < 4; j++) {
      const int32x4_t one = vreinterpretq_s32_s8(vld1q_s8(b + 16 * j));
      const int32x4_t other = LAST ? vdupq_n_s32(0) : vreinterpretq_s32_s8(vld1q_s8(b + 4 * TILE_COLUMNS + 16 * j));
      const int8x16_t left = vreinterpretq_s8_s32(vzip1q_s32(one, other)), right = vreinterpretq_s8_s32(vzip2q_s32(one, other));
      FXQ_UNROLL for (int i = 0; i < R / 2; i++) {
        sums_[i][2 * j] = vmmlaq_s32(sums_[i][2 * j], rows[i], left);
        sums_[i][2 * j + 1] = vmmlaq_s32(sums_[i][2 * j + 1], rows[i], right);
      }
      asm volatile("" ::: "memory");  // or compilers load all weights first and spill sums
    }
  }

 private:
  int32x4_t sums_[R / 2][8];
};

template <int R>
void multiply_pairs(const int8_t* a, const int8_t* b, long steps, int32_t* c) {
  MatrixSums<R> sums(c);
  for (; steps >= 2; steps -= 2, a += 8 * R, b += 8 * TILE_COLUMNS) sums.template add<false>(a, b);
  if (steps) sums.template add<true>(a, b);
  sums.store(c);
}

struct ProductTile {
  static constexpr int OFFSET = 0;
  static constexpr long STEPS = 2, HEIGHT = 2;

  template <int R>
  static void multiply(const uint8_t* a, const int8_t* b, long steps, int32_t* c) {
    for (int j = 0; j < TILE_COLUMNS; j += 16) multiply_pairs<R>(reinterpret_cast<const int8_t*>(a), b + 4 * j, steps, c + j);
  }
};

}  // namespace fxq
