// Rows as tiles read them: a few channels at a time between the other rows of their tile, so that a tile is one stream.
#pragma once

#include <cstdint>
#include <type_traits>

#include "product.h"

namespace fxq {

// Calls f(a row's int8 of a segment, its channels, whether it is the outliers') for both segments.
template <typename F>
inline void each_segment(const Linear& p, const Segments& s, long row, F f) {
  const int8_t* from = p.q + row * p.q_stride;
  f(from, p.split, false);
  if (s.outlier) f(from + p.split, p.width - p.split, true);
}

// [depth / (4 * steps)][rows of the tile][4 * steps] bytes, tile after tile.
class RowLayout {
 public:
  // Segments begin with a group of `steps` steps, tiles have multiples of `height` rows.
  RowLayout(const Segments& s, long steps, long height)
      : normal_(4 * round_up(s.normal, steps)), depth_(normal_ + 4 * round_up(s.outlier, steps)), height_(height) {}

  long normal() const { return normal_; }  // bytes of a row's normal segment
  long depth() const { return depth_; }    // of both
  long height(long rows, long tile) const { return round_up(std::min<long>(TILE_ROWS, rows - tile), height_); }

 private:
  long normal_, depth_, height_;
};

// Writes the bytes + OFFSET of `rows` rows from `begin` on. What fills up a segment's last group meets weights of zero, or
// is zero; rows that fill up a tile are zero.
template <int OFFSET, long STEPS = 1>
void pack_rows(const Linear& p, const Segments& s, const RowLayout& layout, long begin, long rows, uint8_t* packed) {
  using Group = std::conditional_t<STEPS == 1, uint32_t, uint64_t>;
  static_assert(sizeof(Group) == 4 * STEPS && (OFFSET == 0 || OFFSET == 128));
  constexpr Group FLIP = OFFSET ? static_cast<Group>(0x8080808080808080ull) : 0;
  constexpr long EACH = sizeof(Group);
  for (long row = 0; row < rows; row++) {
    const long tile = row / TILE_ROWS * TILE_ROWS, height = layout.height(rows, tile);
    each_segment(p, s, begin + row, [&](const int8_t* from, long width, bool outlier) {
      uint8_t* to = packed + tile * layout.depth() + (outlier ? layout.normal() * height : 0) + EACH * (row - tile);
      const auto put = [&](const int8_t* bytes) __attribute__((always_inline)) {
        Group group;
        std::memcpy(&group, bytes, EACH);
        group ^= FLIP;
        std::memcpy(to, &group, EACH);
        to += EACH * height;
      };
      long k = 0;
      for (; k + EACH <= width; k += EACH) put(from + k);
      if (k == width) return;
      int8_t last[EACH] = {};
      std::memcpy(last, from + k, width - k);
      put(last);
    });
  }
  const long tile = (rows - 1) / TILE_ROWS * TILE_ROWS, height = layout.height(rows, tile);
  for (long row = rows - tile; row < height; row++) {
    for (long k = 0; k < layout.depth(); k += EACH) std::memset(packed + tile * layout.depth() + k * height + EACH * row, 0, EACH);
  }
}

}  // namespace fxq
