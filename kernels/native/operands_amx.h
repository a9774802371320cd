// Operands of attention for AMX; see operands.h. Sixteen steps of a panel are four tiles of 16 columns as they lie.
//
// A weight of 15 bits is two bytes without a sign, 128 * high + low, each of which is multiplied.
#pragma once

#include "operands_avx512.h"
#include "tile_amx.h"

namespace fxq::amx {

constexpr long STEPS = 16;
constexpr long STEP_BYTES = 4, PANEL_STEP = STEP_BYTES * TILE_COLUMNS;

// The compiler does not know what tiles are loaded from.
inline void settle() { asm volatile("" ::: "memory"); }

// Tiles 0 to 3 += tiles 4, 5 times tiles 6, 7.
struct BfloatProduct {
  static void add() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
};

struct ByteProduct {  // of unsigned rows
  static void add() {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
};

// Two tiles of 16 rows, `a` and `lower`, times 32 columns; sums at c and c_lower. Strides in bytes.
template <typename Step, bool ADD>
inline void multiply_tiles(const void* a, const void* lower, long stride, const void* b, long steps, void* c, long c_stride,
                           void* c_lower, long lower_stride) {
  char *upper_sums = static_cast<char*>(c), *lower_sums = static_cast<char*>(c_lower);
  if constexpr (ADD) {
    _tile_loadd(0, upper_sums, c_stride);
    _tile_loadd(1, upper_sums + 64, c_stride);
    _tile_loadd(2, lower_sums, lower_stride);
    _tile_loadd(3, lower_sums + 64, lower_stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (long k = 0; k < steps; k += STEPS) {
    const char* panel = static_cast<const char*>(b) + k * PANEL_STEP;
    _tile_loadd(4, static_cast<const char*>(a) + k * STEP_BYTES, stride);
    _tile_loadd(6, panel, PANEL_STEP);
    _tile_loadd(7, panel + 64, PANEL_STEP);
    _tile_loadd(5, static_cast<const char*>(lower) + k * STEP_BYTES, stride);
    Step::add();
  }
  _tile_stored(0, upper_sums, c_stride);
  _tile_stored(1, upper_sums + 64, c_stride);
  _tile_stored(2, lower_sums, lower_stride);
  _tile_stored(3, lower_sums + 64, lower_stride);
}

// c [32 rows, 64] (+)= a * b; strides in bytes.
template <typename Step, bool ADD>
inline void multiply_rows(const void* a, long stride, const void* b, long steps, void* c, long c_stride) {
  settle();
  const char *from = static_cast<const char*>(a), *panel = static_cast<const char*>(b);
  char* to = static_cast<char*>(c);
  for (int half = 0; half < 2; half++, panel += 128, to += 128) {
    multiply_tiles<Step, ADD>(from, from + 16 * stride, stride, panel, steps, to, c_stride, to + 16 * c_stride, c_stride);
  }
}

struct FloatOperands : avx512::FloatOperands {
  static constexpr long ROWS = 32, STEPS = amx::STEPS;
  using Session = TileSession;

  static void multiply(const Row* a, long stride, const Number* b, long steps, Sum* c, long c_stride) {
    multiply_rows<BfloatProduct, false>(a, 2 * stride, b, steps, c, 4 * c_stride);
  }
  static void add_multiply(const Row* a, long stride, const Number* b, long steps, Sum* c, long c_stride) {
    multiply_rows<BfloatProduct, true>(a, 2 * stride, b, steps, c, 4 * c_stride);
  }
};

struct CodeOperands : avx512::CodeOperands {
  static constexpr long ROWS = 32, STEPS = amx::STEPS;
  using Session = TileSession;

  static void multiply(const Row* a, long stride, const Number* b, long steps, Sum* c, long c_stride) {
    multiply_rows<ByteProduct, false>(a, stride, b, steps, c, 4 * c_stride);
  }
};

struct WeightOperands {
  using Number = int8_t;
  using Row = uint8_t;
  using Sum = int32_t;
  static constexpr int EACH = 4;
  static constexpr long ROWS = 16, STEPS = amx::STEPS, PARTS = 2;

  static long place(long, long step, long column) { return EACH * (step * TILE_COLUMNS + column); }
  static void multiply(const Row* a, long stride, const Number* b, long steps, Sum* c, long c_stride) {
    alignas(64) int32_t low[ROWS * TILE_COLUMNS];
    settle();
    for (int d = 0; d < TILE_COLUMNS; d += 32) {
      multiply_tiles<ByteProduct, false>(a, a + stride / PARTS, stride, b + EACH * d, steps, c + d, 4 * c_stride, low + d,
                                         4 * TILE_COLUMNS);
    }
    settle();
    for (long i = 0; i < ROWS; i++) {
      for (int d = 0; d < TILE_COLUMNS; d += LANES) {
        const Ints high = _mm512_slli_epi32(load_ints(c + i * c_stride + d), 7);
        store(c + i * c_stride + d, plus(high, load_ints(low + i * TILE_COLUMNS + d)));
      }
    }
  }
  static void interleave(const Ints codes[EACH], Number* to) {
    Ints all = _mm512_and_si512(codes[0], ints(0xFF));
    for (int i = 1; i < EACH; i++) all = _mm512_or_si512(all, _mm512_slli_epi32(_mm512_and_si512(codes[i], ints(0xFF)), 8 * i));
    _mm512_storeu_si512(to, all);
  }
  static void put_weights(Row* to, long low, Ints weights) {
    store(reinterpret_cast<int8_t*>(to), to_bytes(_mm512_srli_epi32(weights, 7)));
    store(reinterpret_cast<int8_t*>(to + low), to_bytes(_mm512_and_si512(weights, ints(127))));
  }
};

}  // namespace fxq::amx
