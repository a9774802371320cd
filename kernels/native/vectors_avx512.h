// Vectors of 16 lanes for AVX512; see vectors.h.
#pragma once

#include <immintrin.h>

#include "common.h"

namespace fxq {

using Floats = __m512;
using Ints = __m512i;
using Bytes = __m128i;
using Lanes = __mmask16;
constexpr int LANES = 16;
constexpr int SUMS = 1;  // that a long sum is split into
constexpr Lanes ALL = 0xFFFF;

// Lanes of a vector that hold elements, when `left` of them are left.
inline Lanes lanes(long left) { return left >= 16 ? ALL : static_cast<Lanes>((1u << std::max(0L, left)) - 1); }
inline uint32_t bits(Lanes lanes) { return lanes; }

inline Floats floats(float x) { return _mm512_set1_ps(x); }
inline Ints ints(int32_t x) { return _mm512_set1_epi32(x); }
inline Ints places() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

inline Floats fmadd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats greatest(Floats a, Floats b) { return _mm512_max_ps(a, b); }  // b where one is NaN
inline Floats least(Floats a, Floats b) { return _mm512_min_ps(a, b); }     // b where one is NaN
inline Floats magnitude(Floats a) { return _mm512_abs_ps(a); }
inline Floats keep(Floats a, Lanes lanes) { return _mm512_maskz_mov_ps(lanes, a); }
inline float sum(Floats a) { return _mm512_reduce_add_ps(a); }
inline bool any_nan(Floats a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) != 0; }
inline uint32_t not_finite(Floats a) { return _mm512_fpclass_ps_mask(a, 0x99); }  // NaN of both kinds, infinity of both signs

inline float highest(Floats a) { return _mm512_reduce_max_ps(a); }  // of numbers, none NaN
inline Floats choose(Floats a, Floats b, Lanes first) { return _mm512_mask_mov_ps(b, first, a); }  // a in the lanes of `first`

// a where the number is below zero, b elsewhere.
inline Floats below_zero(Floats number, Floats a, Floats b) {
  return _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask(number, _mm512_setzero_ps(), _CMP_LT_OQ), a);
}

// v and its place where it is greater than the best so far.
inline void take_greater(Floats v, Ints place, Floats& best, Ints& found) {
  const __mmask16 more = _mm512_cmp_ps_mask(v, best, _CMP_GT_OQ);
  best = _mm512_mask_mov_ps(best, more, v);
  found = _mm512_mask_mov_epi32(found, more, place);
}

inline Ints plus(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints minus(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
inline Ints times(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
template <int COUNT>
inline Ints shift_down(Ints a) {
  return _mm512_srai_epi32(a, COUNT);
}
inline Ints greatest(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
inline Ints word_of(Floats a) { return _mm512_castps_si512(a); }  // as it lies in memory
inline Ints to_ints(Floats a) { return _mm512_cvtps_epi32(a); }  // nearest, half to even
inline Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
inline Bytes to_bytes(Ints a) { return _mm512_cvtepi32_epi8(a); }  // of values that int8 holds
inline Bytes choose(Bytes a, Bytes b, Lanes first) { return _mm_mask_mov_epi8(b, first, a); }  // a in the lanes of `first`

inline Ints load_ints(const int32_t* p) { return _mm512_loadu_si512(p); }

inline Floats widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }

inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline Floats load(const bfloat16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }

// Masked accesses to memory are several times slower than whole ones on some CPUs: a branch chooses. Other lanes are 0.
inline Floats load(const float* p, Lanes mask) { return mask == ALL ? load(p) : _mm512_maskz_loadu_ps(mask, p); }

inline Floats load(const bfloat16* p, Lanes mask) {
  return mask == ALL ? load(p) : widen(_mm256_maskz_loadu_epi16(mask, p));
}

inline void store(int32_t* p, Ints v) { _mm512_storeu_si512(p, v); }

// As rows of a square, turned around.
inline void turn(Ints rows[LANES]) {
  Ints half[LANES];
  for (int i = 0; i < LANES; i += 2) {
    half[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    half[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < LANES; i += 4) {
    for (int j = 0; j < 2; j++) {
      rows[i + 2 * j] = _mm512_unpacklo_epi64(half[i + j], half[i + 2 + j]);
      rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(half[i + j], half[i + 2 + j]);
    }
  }
  for (int i = 0; i < LANES; i += 8) {
    for (int j = 0; j < 4; j++) {
      half[i + j] = _mm512_shuffle_i32x4(rows[i + j], rows[i + 4 + j], 0x88);
      half[i + 4 + j] = _mm512_shuffle_i32x4(rows[i + j], rows[i + 4 + j], 0xDD);
    }
  }
  for (int j = 0; j < 8; j++) {
    rows[j] = _mm512_shuffle_i32x4(half[j], half[8 + j], 0x88);
    rows[8 + j] = _mm512_shuffle_i32x4(half[j], half[8 + j], 0xDD);
  }
}

inline void store(float* p, Floats v, Lanes mask = ALL) {
  if (mask == ALL) return _mm512_storeu_ps(p, v);
  _mm512_mask_storeu_ps(p, mask, v);
}

#ifdef __AVX512BF16__
inline __m256i to_bfloat16(Floats v) { return (__m256i)_mm512_cvtneps_pbh(v); }
#else
// To the nearest, half to even: half of the last place, less where it is even, carries into the upper half or not.
inline __m256i to_bfloat16(Floats v) {
  const Ints word = word_of(v), last = _mm512_and_si512(_mm512_srli_epi32(word, 16), ints(1));
  const Ints rounded = plus(word, plus(last, ints(0x7FFF)));
  const Ints quiet = _mm512_or_si512(word, ints(0x400000));
  const Ints found = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(found, 16));
}
#endif

template <typename T>
inline Floats rounded(Floats v) {  // to T
  return sizeof(T) == 2 ? widen(to_bfloat16(v)) : v;
}

inline void store(bfloat16* p, Floats v, Lanes mask = ALL) {
  if (mask == ALL) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bfloat16(v));
  _mm256_mask_storeu_epi16(p, mask, to_bfloat16(v));
}

inline void store(int8_t* p, Bytes v, Lanes mask = ALL) {
  if (mask == ALL) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v);
  _mm_mask_storeu_epi8(p, mask, v);
}

// p[0], p[0], p[1], p[1], ... for the lanes of a vector of `left` elements.
inline Floats load_twice(const float* p, long left) {
  const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  const Floats half = left >= LANES ? _mm512_castps256_ps512(_mm256_loadu_ps(p)) : load(p, lanes(left / 2) & 0xFF);
  return _mm512_permutexvar_ps(twice, half);
}

// Neighbouring pairs (even, odd) -> (even c - odd s, even s + odd c).
inline Floats rotate(Floats v, Floats c, Floats s) {
  return _mm512_fmaddsub_ps(v, c, _mm512_mul_ps(_mm512_permute_ps(v, 0xB1), s));
}

// exp(x) to about 1e-7 relative; saturates to 0 and infinity.
inline Floats exp(Floats x) {
  x = greatest(floats(-150.0f), x);  // NaN stays; far below, what is left of x would overflow
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896f)), 0x08);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 720);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// 1 / x to about 1e-7 relative for normal x >= 1; 0 at infinity.
inline Floats reciprocal(Floats x) {
  const __m512 guess = _mm512_rcp14_ps(x);
  const __m512 error = _mm512_fnmadd_ps(x, guess, _mm512_set1_ps(1.0f));
  const __mmask16 finite = _mm512_cmp_ps_mask(x, _mm512_set1_ps(1e38f), _CMP_LT_OQ);
  return _mm512_mask_fmadd_ps(guess, finite, error, guess);
}

inline __mmask32 poison_lanes(long width) { return width >= POISON_MOST ? ~0u : (1u << width) - 1; }

inline void poison(int8_t* row, long width) {
  if (width < POISON_LEAST) return;
  const __m256i codes = _mm256_mask_blend_epi8(POISON, _mm256_set1_epi8(-128), _mm256_set1_epi8(127));
  _mm256_mask_storeu_epi8(row, poison_lanes(width), codes);
}

inline bool poisoned(const int8_t* row, long width) {
  if (width < POISON_LEAST) return false;
  const __m256i codes = _mm256_mask_blend_epi8(POISON, _mm256_set1_epi8(-128), _mm256_set1_epi8(127));
  const __mmask32 mask = poison_lanes(width);
  return _mm256_mask_cmpneq_epi8_mask(mask, _mm256_maskz_loadu_epi8(mask, row), codes) == 0;
}

}  // namespace fxq
