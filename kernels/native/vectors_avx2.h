// Vectors of 8 lanes for AVX2 with FMA; see vectors.h.
#pragma once

#include <immintrin.h>

#include "common.h"

namespace fxq {

using Floats = __m256;
using Ints = __m256i;
using Bytes = __m128i;  // in its lower half
struct Lanes {
  int count;  // the first ones
};
constexpr int LANES = 8;
constexpr int SUMS = 4;  // that a long sum is split into: an addition waits for the one before
constexpr Lanes ALL = {LANES};

// Lanes of a vector that hold elements, when `left` of them are left.
inline Lanes lanes(long left) { return {static_cast<int>(std::max(0L, std::min<long>(left, LANES)))}; }
inline uint32_t bits(Lanes lanes) { return (1u << lanes.count) - 1; }

inline __m256i load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_bytes(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

inline Floats floats(float x) { return _mm256_set1_ps(x); }
inline Ints ints(int32_t x) { return _mm256_set1_epi32(x); }
inline Ints places() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
inline Ints counted(Lanes lanes) { return _mm256_cmpgt_epi32(ints(lanes.count), places()); }

inline Floats fmadd(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats greatest(Floats a, Floats b) { return _mm256_max_ps(a, b); }  // b where one is NaN
inline Floats least(Floats a, Floats b) { return _mm256_min_ps(a, b); }     // b where one is NaN
inline Floats magnitude(Floats a) { return _mm256_andnot_ps(floats(-0.0f), a); }
inline Floats keep(Floats a, Lanes lanes) { return _mm256_and_ps(a, _mm256_castsi256_ps(counted(lanes))); }
inline bool any_nan(Floats a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)) != 0; }

inline float sum(Floats a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

inline uint32_t not_finite(Floats a) {
  return _mm256_movemask_ps(_mm256_cmp_ps(magnitude(a), floats(INFINITY), _CMP_NLT_UQ));
}

inline float highest(Floats a) {  // of numbers, none NaN
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

inline Floats choose(Floats a, Floats b, Lanes first) {  // a in the lanes of `first`
  return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(counted(first)));
}

// a where the number is below zero, b elsewhere.
inline Floats below_zero(Floats number, Floats a, Floats b) {
  return _mm256_blendv_ps(b, a, _mm256_cmp_ps(number, floats(0), _CMP_LT_OQ));
}

// v and its place where it is greater than the best so far.
inline void take_greater(Floats v, Ints place, Floats& best, Ints& found) {
  const __m256 more = _mm256_cmp_ps(v, best, _CMP_GT_OQ);
  best = _mm256_blendv_ps(best, v, more);
  found = _mm256_blendv_epi8(found, place, _mm256_castps_si256(more));
}

inline Ints plus(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints minus(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
inline Ints times(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }
template <int COUNT>
inline Ints shift_down(Ints a) {
  return _mm256_srai_epi32(a, COUNT);
}
inline Ints greatest(Ints a, Ints b) { return _mm256_max_epi32(a, b); }
inline Ints greatest_unsigned(Ints a, Ints b) { return _mm256_max_epu32(a, b); }
inline Ints both(Ints a, Ints b) { return _mm256_and_si256(a, b); }
inline Ints without(Ints mask, Ints a) { return _mm256_andnot_si256(mask, a); }
inline Ints word_of(Floats a) { return _mm256_castps_si256(a); }  // as it lies in memory
inline Ints to_ints(Floats a) { return _mm256_cvtps_epi32(a); }  // nearest, half to even
inline Floats to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }

inline Bytes to_bytes(Ints a) {  // of values that int8 holds
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  return _mm_packs_epi16(words, words);
}

// Four vectors of values that int8 holds, in order.
inline __m256i to_bytes(Ints a, Ints b, Ints c, Ints d) {
  const __m256i mixed = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
  return _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

inline Bytes choose(Bytes a, Bytes b, Lanes first) {  // a in the lanes of `first`
  const __m128i place = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm_blendv_epi8(b, a, _mm_cmpgt_epi8(_mm_set1_epi8(static_cast<char>(first.count)), place));
}

inline Ints load_ints(const int32_t* p) { return load_bytes(p); }

inline Floats load(const float* p) { return _mm256_loadu_ps(p); }

inline Floats load(const bfloat16* p) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}

// Other lanes are 0 and their memory is not touched.
template <typename T>
inline Floats load(const T* p, Lanes mask) {
  if (mask.count == LANES) return load(p);
  T part[LANES] = {};
  std::memcpy(part, p, mask.count * sizeof(T));
  return load(part);
}

inline void store(int32_t* p, Ints v) { store_bytes(p, v); }
inline void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline void store(int8_t* p, Bytes v) { _mm_storel_epi64(reinterpret_cast<__m128i*>(p), v); }

// Nearest, half to even; NaN stays NaN. Each number's in the upper half of its lane.
inline Ints to_bfloat16_word(Floats v) {
  const __m256i word = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(word, 16), ints(1));
  const __m256i rounded = _mm256_add_epi32(word, _mm256_add_epi32(odd, ints(0x7FFF)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, ints(0x7FC00000), nan);
}

template <typename T>
inline Floats rounded(Floats v) {  // to T
  if (sizeof(T) == 4) return v;
  return _mm256_castsi256_ps(_mm256_and_si256(to_bfloat16_word(v), ints(static_cast<int32_t>(0xFFFF0000u))));
}

inline void store(bfloat16* p, Floats v) {
  const __m256i high = _mm256_srli_epi32(to_bfloat16_word(v), 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}

// As rows of a square, turned around.
inline void turn(Ints rows[LANES]) {
  Ints half[LANES];
  for (int i = 0; i < LANES; i += 2) {
    half[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
    half[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < LANES; i += 4) {
    for (int j = 0; j < 2; j++) {
      rows[i + 2 * j] = _mm256_unpacklo_epi64(half[i + j], half[i + 2 + j]);
      rows[i + 2 * j + 1] = _mm256_unpackhi_epi64(half[i + j], half[i + 2 + j]);
    }
  }
  for (int j = 0; j < 4; j++) {
    half[j] = _mm256_permute2x128_si256(rows[j], rows[4 + j], 0x20);
    half[4 + j] = _mm256_permute2x128_si256(rows[j], rows[4 + j], 0x31);
  }
  for (int i = 0; i < LANES; i++) rows[i] = half[i];
}

template <typename T, typename V>
inline void store(T* p, V v, Lanes mask) {
  if (mask.count == LANES) return store(p, v);
  T part[LANES];
  store(part, v);
  std::memcpy(p, part, mask.count * sizeof(T));
}

// p[0], p[0], p[1], p[1], ... for the lanes of a vector of `left` elements.
inline Floats load_twice(const float* p, long left) {
  __m128 half;
  if (left >= LANES) {
    half = _mm_loadu_ps(p);
  } else {
    float part[LANES / 2] = {};
    std::memcpy(part, p, left / 2 * sizeof(float));
    half = _mm_loadu_ps(part);
  }
  return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(half), _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
}

// Neighbouring pairs (even, odd) -> (even c - odd s, even s + odd c).
inline Floats rotate(Floats v, Floats c, Floats s) {
  return _mm256_fmaddsub_ps(v, c, _mm256_mul_ps(_mm256_permute_ps(v, 0xB1), s));
}

// exp(x) to about 1e-7 relative; saturates to 0 and infinity.
inline Floats exp(Floats x) {
  x = greatest(floats(-150.0f), least(floats(128.0f), x));  // NaN stays
  const __m256 n = _mm256_round_ps(x * floats(1.44269504088896f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, floats(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, floats(-2.12194440e-4f), r);
  __m256 p = floats(1.0f / 720);
  p = fmadd(p, r, floats(1.0f / 120));
  p = fmadd(p, r, floats(1.0f / 24));
  p = fmadd(p, r, floats(1.0f / 6));
  p = fmadd(p, r, floats(0.5f));
  p = fmadd(p, r, floats(1.0f));
  p = fmadd(p, r, floats(1.0f));
  // 2^n in two halves: n is -217 to 185, an exponent -126 to 127.
  const __m256i whole = to_ints(n), half = _mm256_srai_epi32(whole, 1), rest = minus(whole, half);
  const auto power = [](__m256i e) { return _mm256_castsi256_ps(_mm256_slli_epi32(plus(e, ints(127)), 23)); };
  return p * power(half) * power(rest);
}

// 1 / x; 0 at infinity.
inline Floats reciprocal(Floats x) { return _mm256_div_ps(floats(1.0f), x); }

inline __m256i poison_codes() {
  const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201ull));
  const __m256i bits = _mm256_and_si256(_mm256_shuffle_epi8(ints(static_cast<int32_t>(POISON)), spread), bit);
  return _mm256_blendv_epi8(_mm256_set1_epi8(-128), _mm256_set1_epi8(127), _mm256_cmpeq_epi8(bits, bit));
}

inline void poison(int8_t* row, long width) {
  if (width < POISON_LEAST) return;
  alignas(32) int8_t codes[POISON_MOST];
  store_bytes(codes, poison_codes());
  std::memcpy(row, codes, std::min(width, POISON_MOST));
}

inline bool poisoned(const int8_t* row, long width) {
  if (width < POISON_LEAST) return false;
  alignas(32) int8_t codes[POISON_MOST];
  store_bytes(codes, poison_codes());
  return std::memcmp(row, codes, std::min(width, POISON_MOST)) == 0;
}

}  // namespace fxq
