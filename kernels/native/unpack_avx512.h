// What unpack.h needs beside vectors.h, for AVX512.
#pragma once

#include "vectors.h"

namespace fxq {

constexpr int PRODUCT_ROWS = 8, PRODUCT_VECTORS = 2;  // sums that stay in registers

// Codes of the next LANES channels, the first one in the lowest bits.
template <int BITS>
inline Ints codes_at(const uint8_t* p) {
  if constexpr (BITS == 8) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  } else if constexpr (BITS == 4) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), low = _mm_set1_epi8(15);
    const __m128i codes = _mm_unpacklo_epi8(_mm_and_si128(bytes, low), _mm_and_si128(_mm_srli_epi16(bytes, 4), low));
    return _mm512_cvtepu8_epi32(codes);
  } else {
    uint32_t word;
    std::memcpy(&word, p, 4);
    const __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_and_si512(_mm512_srlv_epi32(ints(static_cast<int32_t>(word)), shifts), ints(3));
  }
}

// value in the lanes whose bit is set, 0 elsewhere.
inline Ints where_set(uint32_t bits, int32_t value) { return _mm512_maskz_set1_epi32(static_cast<__mmask16>(bits), value); }

// Which lanes have the bit.
inline uint32_t set_bits(Ints a, int bit) { return _mm512_test_epi32_mask(a, ints(1 << bit)); }

inline Floats round_down(Floats a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }

}  // namespace fxq
