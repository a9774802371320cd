// Rows as the products read them whose loops broadcast four bytes of a row: step by step between the other rows of their
// tile, [steps][R rows][4 bytes], so that a tile is one stream.
#pragma once

#include <cstdint>

#include "product.h"

namespace fxq {

// Calls f(a row's int8 of a segment, its channels, where the segment begins in a packed row) for both segments.
template <typename F>
inline void each_segment(const Linear& p, const Segments& s, long row, F f) {
  const int8_t* from = p.q + row * p.q_stride;
  f(from, p.split, 0L);
  if (s.outlier) f(from + p.split, p.width - p.split, 4 * s.normal);
}

inline long tile_height(long rows, long tile) { return std::min<long>(TILE_ROWS, rows - tile); }

// Writes `rows` rows from `begin` on. `flip` is 0x80808080 where bytes become unsigned, 0 where they stay. The last step of
// a segment is filled up with what meets weights of zero.
template <uint32_t FLIP>
void pack_rows(const Linear& p, const Segments& s, long begin, long rows, void* packed) {
  const long depth = 4 * s.steps();
  for (long row = 0; row < rows; row++) {
    const long tile = row / TILE_ROWS * TILE_ROWS, height = tile_height(rows, tile);
    each_segment(p, s, begin + row, [&](const int8_t* from, long width, long first) {
      uint8_t* to = static_cast<uint8_t*>(packed) + tile * depth + first * height + 4 * (row - tile);
      const auto put = [&](const int8_t* four) __attribute__((always_inline)) {
        uint32_t word;
        std::memcpy(&word, four, sizeof(word));
        word ^= FLIP;
        std::memcpy(to, &word, sizeof(word));
        to += 4 * height;
      };
      long k = 0;
      for (; k + 4 <= width; k += 4) put(from + k);
      if (k == width) return;
      int8_t last[4] = {};
      std::memcpy(last, from + k, width - k);
      put(last);
    });
  }
}

}  // namespace fxq
