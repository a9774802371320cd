// What pairs of weights have above what vpmaddubsw holds: few numbers, multiplied apart.
//
// A pair of neighbours saturates where both have one sign and add up to more than 128 (tile_avx2.h). It then gives its
// excess over +-128 to this list, taken from the first of the two, and the pair that stays fits.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "product.h"
#include "vectors.h"

namespace fxq {

// What two neighbours are more than +-128 together, 16 times int16. It is at most as large as the first of them, since
// the second is within +-128: the first keeps its sign without it, or is 0, and the pair is +-128 then.
inline __m256i excess(__m256i w) {
  const __m256i sum = _mm256_maddubs_epi16(_mm256_set1_epi8(1), w);
  const __m256i fitting = _mm256_max_epi16(_mm256_min_epi16(sum, _mm256_set1_epi16(128)), _mm256_set1_epi16(-128));
  return _mm256_sub_epi16(sum, fitting);
}

struct Excess {
  int32_t channel;
  int16_t value;  // |value| <= 128
  int8_t column;
  bool last;  // of those whose values together are within +-128
};

// Of a panel: sorted by column before it is used.
class ExcessList {
 public:
  static constexpr long MOST = 8192, ROWS = 32;

  long count() const { return count_; }
  void shorten(long count) { count_ = count; }

  // The first channel of the pairs is `channel` for even ones, and two more for odd ones; columns are from `column` on.
  void add(__m256i over, long channel, long column) {
    alignas(32) int16_t values[16];
    store_bytes(values, over);
    uint32_t rest = ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi16(over, _mm256_setzero_si256())));
    for (; rest != 0; rest &= ~(3u << __builtin_ctz(rest))) {
      const int pair = __builtin_ctz(rest) / 2;
      list_[count_++] = {static_cast<int32_t>(channel + pair % 2 * 2), values[pair], static_cast<int8_t>(column + pair / 2), false};
    }
  }

  // Adds it to sums [rows, TILE_COLUMNS] and empties it. `columns` holds the rows' unsigned bytes [channels][stride], the
  // stride and the rows of the sums padded to ROWS.
  void multiply(const uint8_t* columns, long stride, long rows, int32_t* sums) {
    sort();
    alignas(32) int32_t products[8 * ROWS];
    for (int column = 0; column < TILE_COLUMNS; column += 8) {
      if (start_[column] == start_[column + 8]) continue;
      for (long row = 0; row < rows; row += ROWS) {
        for (int j = 0; j < 8; j++) multiply_column(columns + row, stride, column + j, products + j * ROWS);
        for (long i = 0; i < ROWS; i += 8) add_transposed(products + i, sums + (row + i) * TILE_COLUMNS + column);
      }
    }
    count_ = 0;
  }

 private:
  void sort() {
    std::memset(start_, 0, sizeof(start_));
    for (long i = 0; i < count_; i++) start_[list_[i].column + 1]++;
    for (int j = 0; j < TILE_COLUMNS; j++) start_[j + 1] += start_[j];
    int32_t next[TILE_COLUMNS];
    std::memcpy(next, start_, sizeof(next));
    for (long i = 0; i < count_; i++) sorted_[next[list_[i].column]++] = list_[i];
    for (int j = 0; j < TILE_COLUMNS; j++) {
      for (int i = start_[j], room = 128; i < start_[j + 1]; i++) {
        room -= std::abs(sorted_[i].value);
        sorted_[i].last = i + 1 == start_[j + 1] || room < std::abs(sorted_[i + 1].value);
        if (sorted_[i].last) room = 128;
      }
    }
  }

  // Products of ROWS rows. They add up in int16 while the values together are within +-128: 255 * 128 = 32640.
  void multiply_column(const uint8_t* columns, long stride, int column, int32_t* to) const {
    const __m256i zero = _mm256_setzero_si256();
    __m256i totals[4] = {zero, zero, zero, zero}, sums[2] = {zero, zero};
    for (const Excess *e = sorted_ + start_[column], *end = sorted_ + start_[column + 1]; e < end; e++) {
      const auto* from = reinterpret_cast<const __m128i*>(columns + e->channel * stride);
      const __m256i value = _mm256_set1_epi16(e->value);
      for (int i = 0; i < 2; i++) {
        const __m256i u = _mm256_cvtepu8_epi16(_mm_loadu_si128(from + i));
        sums[i] = _mm256_add_epi16(sums[i], _mm256_mullo_epi16(u, value));
      }
      if (!e->last) continue;
      for (int i = 0; i < 2; i++) {
        totals[2 * i] = plus(totals[2 * i], _mm256_cvtepi16_epi32(_mm256_castsi256_si128(sums[i])));
        totals[2 * i + 1] = plus(totals[2 * i + 1], _mm256_cvtepi16_epi32(_mm256_extracti128_si256(sums[i], 1)));
        sums[i] = zero;
      }
    }
    for (int i = 0; i < 4; i++) store_bytes(to + 8 * i, totals[i]);
  }

  // 8 columns of 8 rows, [8][ROWS] from `from` on, are added to 8 rows of 8 columns.
  static void add_transposed(const int32_t* from, int32_t* to) {
    __m256i a[8], b[8];
    for (int i = 0; i < 8; i++) a[i] = load_ints(from + ROWS * i);
    for (int i = 0; i < 8; i += 2) {
      b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      for (int j = 0; j < 2; j++) {
        a[i + 2 * j] = _mm256_unpacklo_epi64(b[i + j], b[i + 2 + j]);
        a[i + 2 * j + 1] = _mm256_unpackhi_epi64(b[i + j], b[i + 2 + j]);
      }
    }
    for (int i = 0; i < 4; i++) {
      const __m256i rows[2] = {_mm256_permute2x128_si256(a[i], a[i + 4], 0x20), _mm256_permute2x128_si256(a[i], a[i + 4], 0x31)};
      for (int half = 0; half < 2; half++) {
        int32_t* row = to + (i + 4 * half) * TILE_COLUMNS;
        store_bytes(row, plus(load_ints(row), rows[half]));
      }
    }
  }

  long count_ = 0;
  int32_t start_[TILE_COLUMNS + 1];
  Excess list_[MOST], sorted_[MOST];
};

// Unsigned bytes of int8 rows, transposed: to[k * stride + row] for `width` channels.
inline void transpose(const int8_t* from, long row_stride, long rows, long width, uint8_t* to, long stride) {
  const __m128i flip = _mm_set1_epi8(static_cast<char>(0x80));
  for (long row = 0; row < rows; row += 16) {
    for (long k = 0; k < width; k += 16) {
      __m128i a[16], b[16];
      const long bytes = std::min(16L, width - k);
      for (int i = 0; i < 16; i++) {
        a[i] = flip;
        if (row + i >= rows) continue;
        const int8_t* place = from + (row + i) * row_stride + k;
        if (bytes == 16) {
          a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(place));
        } else {
          std::memcpy(&a[i], place, bytes);
        }
      }
      // Four times rows i and i + 8 are interleaved.
      for (int stage = 0; stage < 4; stage++) {
        for (int i = 0; i < 8; i++) {
          b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
          b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
        }
        std::memcpy(a, b, sizeof(a));
      }
      for (long i = 0; i < bytes; i++) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + (k + i) * stride + row), _mm_xor_si128(a[i], flip));
      }
    }
  }
}

}  // namespace fxq
