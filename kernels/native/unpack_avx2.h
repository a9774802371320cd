// What unpack.h needs beside vectors.h, for AVX2.
#pragma once

#include "vectors.h"

namespace fxq {

constexpr int PRODUCT_ROWS = 4, PRODUCT_VECTORS = 2;  // sums that stay in registers

// Codes of the next LANES channels, the first one in the lowest bits.
template <int BITS>
inline Ints codes_at(const uint8_t* p) {
  if constexpr (BITS == 8) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  } else {
    uint32_t word = 0;
    std::memcpy(&word, p, BITS);
    const __m256i shifts = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), ints(BITS));
    return _mm256_and_si256(_mm256_srlv_epi32(ints(static_cast<int32_t>(word)), shifts), ints((1 << BITS) - 1));
  }
}

// value in the lanes whose bit is set, 0 elsewhere.
inline Ints where_set(uint32_t bits, int32_t value) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(ints(static_cast<int32_t>(bits)), lane), lane);
  return _mm256_and_si256(set, ints(value));
}

// Which lanes have the bit.
inline uint32_t set_bits(Ints a, int bit) {
  return _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_sll_epi32(a, _mm_cvtsi32_si128(31 - bit))));
}

inline Floats round_down(Floats a) { return _mm256_floor_ps(a); }

}  // namespace fxq
