// The inner loop of the product for AArch64 with the dot product (sdot); see tiled_product.h.
//
// Both factors are signed, so rows need no offset and the panels' sums of the weights are not subtracted. Exact for any
// int8: sdot adds four products of at most 2^14 in 32 bits, without saturation.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <utility>

#include "product.h"

namespace fxq {

// Adds the products of four bytes of row I and 16 columns. Rows lie four to a register.
template <int I>
inline void add_row(int32x4_t sums[4], const int8x16_t w[4], const int8x16_t* rows) {
  FXQ_UNROLL for (int j = 0; j < 4; j++) sums[j] = vdotq_laneq_s32(sums[j], w[j], rows[I / 4], I % 4);
}

template <int... I>
inline void add_rows(int32x4_t sums[][4], const int8x16_t w[4], const int8x16_t* rows, std::integer_sequence<int, I...>) {
  (add_row<I>(sums[I], w, rows), ...);
}

inline int8x8_t four_bytes(const int8_t* a) {
  int32_t four;
  std::memcpy(&four, a, sizeof(four));
  return vreinterpret_s8_s32(vdup_n_s32(four));
}

// Four bytes of up to four rows.
template <int R>
inline int8x16_t load_rows(const int8_t* a) {
  if constexpr (R == 4) return vld1q_s8(a);
  if constexpr (R == 3) return vcombine_s8(vld1_s8(a), four_bytes(a + 8));
  const int8x8_t first = R == 2 ? vld1_s8(a) : four_bytes(a);
  return vcombine_s8(first, first);
}

// R rows times 16 columns: up to 24 sums, four weights and two registers of rows.
template <int R>
void multiply_bytes(const int8_t* a, const int8_t* b, long steps, int32_t* c) {
  int32x4_t sums[R][4];
  FXQ_UNROLL for (int i = 0; i < R; i++) {
    FXQ_UNROLL for (int j = 0; j < 4; j++) sums[i][j] = vld1q_s32(c + i * TILE_COLUMNS + 4 * j);
  }
  for (long k = 0; k < steps; k++, a += 4 * R, b += 4 * TILE_COLUMNS) {
    int8x16_t w[4], rows[2];
    rows[0] = load_rows<std::min(R, 4)>(a);
    if constexpr (R > 4) rows[1] = load_rows<R - 4>(a + 16);
    FXQ_UNROLL for (int j = 0; j < 4; j++) w[j] = vld1q_s8(b + 16 * j);
    add_rows(sums, w, rows, std::make_integer_sequence<int, R>());
  }
  FXQ_UNROLL for (int i = 0; i < R; i++) {
    FXQ_UNROLL for (int j = 0; j < 4; j++) vst1q_s32(c + i * TILE_COLUMNS + 4 * j, sums[i][j]);
  }
}

struct ProductTile {
  static constexpr int OFFSET = 0;
  static constexpr long STEPS = 1, HEIGHT = 1;

  template <int R>
  static void multiply(const uint8_t* a, const int8_t* b, long steps, int32_t* c) {
    for (int j = 0; j < TILE_COLUMNS; j += 16) multiply_bytes<R>(reinterpret_cast<const int8_t*>(a), b + 4 * j, steps, c + j);
  }
};

}  // namespace fxq
