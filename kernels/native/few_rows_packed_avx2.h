// The product for AVX2 of few rows and packed weights (fxq/kernels/gemm/panels.py), which are unpacked as they are loaded.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "product.h"
#include "tile_avx2.h"
#include "vectors.h"

namespace fxq {

constexpr long PACKED_STEPS = 128;  // of a panel, 16 KB: in the first-level cache while all columns are multiplied

alignas(32) constexpr int8_t HALF[32] = {15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15,
                                         15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15, 15};
alignas(32) constexpr int8_t EIGHTS[32] = {8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8};

// Two steps of 8 columns, -8..7. The constants lie in memory, as registers hold sums.
struct TwoSteps {
  __m256i first, second;

  explicit TwoSteps(const uint8_t* p) {
    const __m256i w = load_bytes(p);
    const auto &half = *reinterpret_cast<const __m256i*>(HALF), &eight = *reinterpret_cast<const __m256i*>(EIGHTS);
    __m256i low, high;  // or compilers store what statements write
    asm("vpand %2, %1, %0\n\tvpsubb %3, %0, %0" : "=x"(low) : "x"(w), "m"(half), "m"(eight));
    asm("vpsrlw $4, %1, %0\n\tvpand %2, %0, %0\n\tvpsubb %3, %0, %0" : "=x"(high) : "x"(w), "m"(half), "m"(eight));
    first = low;
    second = high;
  }
};

// sums [R][TILE_COLUMNS] += rows [R][depth] * steps of 16 columns. Eight steps add up in int16: 8 * 2 * 255 * 8 = 32640.
template <int R>
void multiply_few_packed(const uint8_t* rows, long depth, const uint8_t* panel, long steps, int32_t* sums) {
  constexpr long ROW = 4 * TILE_COLUMNS;
  const auto group = [&](const uint8_t* from, int pairs) __attribute__((always_inline)) {
    __m256i s0[R], s1[R];
    FXQ_UNROLL for (int i = 0; i < R; i++) s0[i] = s1[i] = _mm256_setzero_si256();
    FXQ_UNROLL for (int k = 0; k < pairs; k++, panel += ROW) {
      // The same place of the next block.
      _mm_prefetch(reinterpret_cast<const char*>(panel + PACKED_STEPS / 2 * ROW), _MM_HINT_T0);
      const TwoSteps w0(panel);
      FXQ_UNROLL for (int i = 0; i < R; i++) {
        add_bytes_narrow(s0[i], broadcast(from + i * depth + 8 * k), w0.first);
        add_bytes_narrow(s0[i], broadcast(from + i * depth + 8 * k + 4), w0.second);
      }
      if (R > 2) asm volatile("" ::: "memory");  // or compilers keep what is broadcast in registers that there are not
      const TwoSteps w1(panel + 32);
      FXQ_UNROLL for (int i = 0; i < R; i++) {
        add_bytes_narrow(s1[i], broadcast(from + i * depth + 8 * k), w1.first);
        add_bytes_narrow(s1[i], broadcast(from + i * depth + 8 * k + 4), w1.second);
      }
    }
    FXQ_UNROLL for (int i = 0; i < R; i++) {
      int32_t* to = sums + i * TILE_COLUMNS;
      __m256i c0 = load_ints(to), c1 = load_ints(to + 8);
      add_words(c0, s0[i], load_bytes(ONES));
      add_words(c1, s1[i], load_bytes(ONES));
      store_bytes(to, c0);
      store_bytes(to + 8, c1);
    }
    asm volatile("" ::: "memory");  // as in multiply_narrow
  };
  long k = 0;
  for (; k + 8 <= steps; k += 8) group(rows + 4 * k, 4);
  for (; k < steps; k += 2) group(rows + 4 * k, 1);
}

// Up to 5 rows; `steps` are even.
inline void multiply_few_packed(const uint8_t* a, long depth, long rows, const uint8_t* panel, long steps, int32_t* sums) {
  for (; steps > 0; steps -= PACKED_STEPS, a += 4 * PACKED_STEPS, panel += 2 * TILE_COLUMNS * PACKED_STEPS) {
    const long count = std::min(PACKED_STEPS, steps);
    for (int column = 0; column < TILE_COLUMNS; column += 16) {
      switch (rows) {
        case 5: multiply_few_packed<5>(a, depth, panel + 4 * column, count, sums + column); break;
        case 4: multiply_few_packed<4>(a, depth, panel + 4 * column, count, sums + column); break;
        case 3: multiply_few_packed<3>(a, depth, panel + 4 * column, count, sums + column); break;
        case 2: multiply_few_packed<2>(a, depth, panel + 4 * column, count, sums + column); break;
        default: multiply_few_packed<1>(a, depth, panel + 4 * column, count, sums + column);
      }
    }
  }
}

}  // namespace fxq
