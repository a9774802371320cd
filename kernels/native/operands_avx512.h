// Operands of attention for AVX512: bfloat16 in pairs, bytes in fours, and int16 in pairs; see operands.h.
#pragma once

#include "product.h"
#include "tile_avx512.h"
#include "vectors.h"

namespace fxq {

constexpr long QUERY_ROWS = 192;  // of a block

namespace avx512 {

struct FloatOperands {
  using Number = bfloat16;
  using Row = bfloat16;
  using Sum = float;
  static constexpr int EACH = 2;
  static constexpr long ROWS = TILE_ROWS, STEPS = 1;
  struct Session {};

  static long place(long, long step, long column) { return EACH * (step * TILE_COLUMNS + column); }
  static void multiply(const Row* a, long stride, const Number* b, long steps, Sum* c, long c_stride) {
    multiply_bfloat16(a, 2 * stride, b, steps, c, 4 * c_stride);
  }
  static void add_multiply(const Row* a, long stride, const Number* b, long steps, Sum* c, long c_stride) {
    add_multiply_bfloat16(a, 2 * stride, b, steps, c, 4 * c_stride);
  }
  // To 5e-5 relative: what is rounded to bfloat16 keeps 2e-3. NaN stays.
  static Floats exp(Floats x) {
    const Floats power = greatest(floats(-100.0f), x) * floats(1.44269504088896f);
    const Floats n = _mm512_roundscale_ps(power, 0x08), r = power - n;
    Floats p = fmadd(floats(9.6181291e-3f), r, floats(5.5504109e-2f));
    p = fmadd(p, r, floats(0.240226507f));
    p = fmadd(p, r, floats(0.693147181f));
    return _mm512_scalef_ps(fmadd(p, r, floats(1.0f)), n);
  }
  static void interleave(const Row* rows, long stride, Number* to) {
    const auto wide = [](const Row* row) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row))); };
    _mm512_storeu_si512(to, _mm512_or_si512(wide(rows), _mm512_slli_epi32(wide(rows + stride), 16)));
  }
};

// Rows are unsigned: 255 * 127 * 4 of a step is nothing to its int32 sum.
struct CodeOperands {
  using Number = int8_t;
  using Row = uint8_t;
  using Sum = int32_t;
  static constexpr int EACH = 4;
  static constexpr int OFFSET = 128;
  static constexpr long ROWS = TILE_ROWS, STEPS = 1;
  struct Session {};

  static long place(long, long step, long column) { return EACH * (step * TILE_COLUMNS + column); }
  static void multiply(const Row* a, long stride, const Number* b, long steps, Sum* c, long c_stride) {
    multiply_int8(a, stride, b, steps, c, 4 * c_stride);
  }
};

struct WeightOperands {
  using Number = int16_t;
  using Row = int16_t;
  using Sum = int32_t;
  static constexpr int EACH = 2;
  static constexpr long ROWS = TILE_ROWS, STEPS = 1, PARTS = 1;

  static long place(long, long step, long column) { return EACH * (step * TILE_COLUMNS + column); }
  static void multiply(const Row* a, long stride, const Number* b, long steps, Sum* c, long c_stride) {
    multiply_int16(a, 2 * stride, b, steps, c, 4 * c_stride);
  }
  static void interleave(const Ints codes[EACH], Number* to) {
    _mm512_storeu_si512(to, _mm512_or_si512(_mm512_and_si512(codes[0], ints(0xFFFF)), _mm512_slli_epi32(codes[1], 16)));
  }
  static void put_weights(Row* to, long, Ints weights) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(weights));
  }
};

}  // namespace avx512
}  // namespace fxq
