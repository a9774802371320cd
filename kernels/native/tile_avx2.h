// The inner loops of the product for AVX2: up to 6 rows times 16 columns with all accumulators in registers.
//
// Rows of a tile lie step by step, [steps][R rows][4 bytes], so that they are one stream; a step is broadcast row by row.
// Weights lie as [steps][16 columns][4 bytes]. Sums are int32 [R rows][TILE_COLUMNS] and are added to.
//
// AVX2 multiplies u8 by s8 in pairs that add up in 16 bits with saturation (vpmaddubsw), so every loop says what its
// weights may be. With u in 0..255 nothing saturates as long as the sum of what goes into one int16 stays within
// 255 * 128 = 32640 <= 32767; 255 * 129 = 32895 does not fit.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "product.h"
#include "vectors.h"

namespace fxq {

// Four bytes of one row in all lanes.
inline __m256i broadcast(const void* p) {
  int32_t v;
  std::memcpy(&v, p, sizeof(v));
  return _mm256_set1_epi32(v);
}

// Sums of R rows and 16 columns in registers.
template <int R>
struct Sums {
  __m256i value[R][2];

  explicit Sums(const int32_t* from) {
    FXQ_UNROLL for (int i = 0; i < R; i++) {
      FXQ_UNROLL for (int j = 0; j < 2; j++) value[i][j] = load_ints(from + i * TILE_COLUMNS + 8 * j);
    }
  }
  void store(int32_t* to) const {
    FXQ_UNROLL for (int i = 0; i < R; i++) {
      FXQ_UNROLL for (int j = 0; j < 2; j++) store_bytes(to + i * TILE_COLUMNS + 8 * j, value[i][j]);
    }
  }
};

alignas(32) constexpr int16_t ONES[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

// Multiplication and addition are one statement: from intrinsics compilers gather the additions of several steps and
// spill their terms. `ones` lies in memory, as every register holds something else.
inline void add_words(__m256i& sum, __m256i a, __m256i b) {
#ifdef __AVXVNNI__
  sum = _mm256_dpwssd_avx_epi32(sum, a, b);
#else
  __m256i t;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(t) : "x"(a), "x"(b));
#endif
}

inline void add_bytes(__m256i& sum, __m256i u, __m256i w) {
  __m256i t;
  asm("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
      : "+x"(sum), "=&x"(t)
      : "x"(u), "x"(w), "m"(*reinterpret_cast<const __m256i*>(ONES)));
}

inline __m256i bytes(__m256i u, __m256i w) {
  __m256i t;
  asm("vpmaddubsw %2, %1, %0" : "=x"(t) : "x"(u), "x"(w));
  return t;
}

inline void add_bytes_narrow(__m256i& sum, __m256i u, __m256i w) {
  __m256i t;
  asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(t) : "x"(u), "x"(w));
}

// Any int8 weights, as int16: a step is two channels. |255 * 128| * 2 fits the int32 of vpmaddwd many times over.
template <int R>
void multiply_words(const int16_t* a, const int16_t* b, long steps, int32_t* c) {
  Sums<R> sums(c);
  const auto step = [&](long k) __attribute__((always_inline)) {
    const __m256i b0 = load_bytes(b + 32 * k), b1 = load_bytes(b + 32 * k + 16);
    FXQ_UNROLL for (int i = 0; i < R; i++) {
      const __m256i v = broadcast(a + 2 * (R * k + i));
      add_words(sums.value[i][0], v, b0);
      add_words(sums.value[i][1], v, b1);
    }
  };
  long k = 0;
  for (; k + 4 <= steps; k += 4) {
    step(k);
    step(k + 1);
    step(k + 2);
    step(k + 3);
  }
  for (; k < steps; k++) step(k);
  sums.store(c);
}

// Weights whose neighbours of one sign add up to at most 128: every pair is widened to int32 at once. One product of a
// pair bounds the sum where the signs differ.
template <int R>
void multiply_pairs(const uint8_t* a, const int8_t* b, long steps, int32_t* c) {
  Sums<R> sums(c);
  const auto step = [&](long k) __attribute__((always_inline)) {
    const __m256i b0 = load_bytes(b + 64 * k), b1 = load_bytes(b + 64 * k + 32);
    FXQ_UNROLL for (int i = 0; i < R; i++) {
      const __m256i v = broadcast(a + 4 * (R * k + i));
      add_bytes(sums.value[i][0], v, b0);
      add_bytes(sums.value[i][1], v, b1);
    }
  };
  long k = 0;
  for (; k + 2 <= steps; k += 2) {
    step(k);
    step(k + 1);
  }
  if (k < steps) step(k);
  sums.store(c);
}

// Narrow weights: GROUP steps, two products each, add up in int16 before they are widened, so |w| <= 64 / GROUP:
// 2 * GROUP * 255 * (64 / GROUP) = 32640. The int32 sums lie in the first-level cache.
template <int R, int GROUP>
void multiply_narrow(const uint8_t* a, const int8_t* b, long steps, int32_t* c) {
  const __m256i ones = _mm256_set1_epi16(1);
  const auto group = [&](long k, int count) __attribute__((always_inline)) {
    __m256i s0[R], s1[R];
    const __m256i b0 = load_bytes(b + 64 * k), b1 = load_bytes(b + 64 * k + 32);
    FXQ_UNROLL for (int i = 0; i < R; i++) {
      const __m256i v = broadcast(a + 4 * (R * k + i));
      s0[i] = bytes(v, b0);
      s1[i] = bytes(v, b1);
    }
    FXQ_UNROLL for (int j = 1; j < count; j++) {
      const __m256i d0 = load_bytes(b + 64 * (k + j)), d1 = load_bytes(b + 64 * (k + j) + 32);
      FXQ_UNROLL for (int i = 0; i < R; i++) {
        const __m256i v = broadcast(a + 4 * (R * (k + j) + i));
        add_bytes_narrow(s0[i], v, d0);
        add_bytes_narrow(s1[i], v, d1);
      }
    }
    FXQ_UNROLL for (int i = 0; i < R; i++) {
      int32_t* to = c + i * TILE_COLUMNS;
      __m256i c0 = load_ints(to), c1 = load_ints(to + 8);
      add_words(c0, s0[i], ones);
      add_words(c1, s1[i], ones);
      store_bytes(to, c0);
      store_bytes(to + 8, c1);
    }
    asm volatile("" ::: "memory");  // or compilers keep all int32 sums in registers that there are not
  };
  long k = 0;
  for (; k + GROUP <= steps; k += GROUP) group(k, GROUP);
  for (; k < steps; k++) group(k, 1);
}

}  // namespace fxq
