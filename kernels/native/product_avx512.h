// The product for AVX512 VNNI: tiles of 6 rows times a panel, whose sums stay in the first-level cache.
#pragma once

#include <immintrin.h>

#include "product.h"
#include "tile_avx512.h"

namespace fxq {

class Product {
 public:
  static constexpr double LEAST_WORK = 1 << 23;
  static constexpr long ROWS = TILE_ROWS;
  static constexpr int OFFSET = 128;
  static constexpr bool READS_PACKED = false;

  static long most_rows(const Segments&) { return 384; }

  Product(const Linear& p, const Segments& s, long begin, long end) : s_(s), begin_(begin), end_(end) {
    static thread_local Scratch scratch;
    // A row stride that is no multiple of 4096 keeps the six rows of a tile out of one cache set.
    stride_ = round_up(4 * s.steps(), 64) + 64;
    if (stride_ % 4096 == 0) stride_ += 64;
    rows_ = scratch.get<uint8_t>((end - begin + 2 * TILE_ROWS) * stride_);
    shift_to_unsigned(p);
  }

  template <typename Done>
  void multiply(const int8_t* panel, Done done) const {
    alignas(64) int32_t normal[TILE_ROWS * TILE_COLUMNS], outlier[TILE_ROWS * TILE_COLUMNS];
    for (long row = begin_; row < end_; row += TILE_ROWS) {
      const uint8_t* a = rows_ + (row - begin_) * stride_;
      multiply_int8(a, stride_, panel, s_.normal, normal, 256);
      if (s_.outlier) multiply_int8(a + 4 * s_.normal, stride_, panel + s_.normal * 256, s_.outlier, outlier, 256);
      done(row, static_cast<int>(std::min<long>(TILE_ROWS, end_ - row)), normal, s_.outlier ? outlier : nullptr);
    }
  }

 private:
  // Rows as unsigned bytes, each segment padded to whole steps of four channels.
  void shift_to_unsigned(const Linear& p) {
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
    const auto copy = [&](const int8_t* from, uint8_t* target, long bytes) {
      long k = 0;
      for (; k + 64 <= bytes; k += 64) _mm512_storeu_si512(target + k, _mm512_xor_si512(_mm512_loadu_si512(from + k), flip));
      if (k == bytes) return;
      const __mmask64 mask = (1ull << (bytes - k)) - 1;
      _mm512_mask_storeu_epi8(target + k, mask, _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, from + k), flip));
    };
    uint8_t* to = rows_;
    for (long row = begin_; row < end_; row++, to += stride_) {
      const int8_t* from = p.q + row * p.q_stride;
      copy(from, to, p.split);
      copy(from + p.split, to + 4 * s_.normal, p.width - p.split);
    }
  }

  Segments s_;
  long begin_, end_, stride_;
  uint8_t* rows_;
};

}  // namespace fxq
