// The product for instruction sets whose instructions add several products of bytes in 32 bits: rows are packed for a
// tile, weights are read as they lie. A block of a panel stays in the first-level cache while all rows go over it.
//
// The tile says how:
//
//   static constexpr int OFFSET;   // that is added to the rows' bytes: 128 where they are unsigned, or 0
//   static constexpr long STEPS;   // of four channels, that are packed together
//   static constexpr long HEIGHT;  // rows that are multiplied together
//   template <int R> static void multiply(const uint8_t* a, const int8_t* b, long steps, int32_t* c);
//
// c [R, TILE_COLUMNS] += a [steps / STEPS, R, 4 * STEPS] * b [steps, TILE_COLUMNS, 4] with R up to TILE_ROWS, a multiple of
// HEIGHT; `steps` may be no multiple of STEPS, then a has zeros for the rest, and b ends.
#pragma once

#include "packed_rows.h"
#include "product.h"

namespace fxq {

template <typename Tile>
class TiledProduct {
 public:
  static constexpr double LEAST_WORK = 1 << 22;
  static constexpr long ROWS = TILE_ROWS;
  static constexpr int OFFSET = Tile::OFFSET;
  static constexpr bool READS_PACKED = false;

  // Their bytes stay in the second-level cache, and so do their sums.
  static long most_rows(const Segments& s) { return std::max(192L, std::min(768L, (800L << 10) / std::max(1L, 4 * s.steps()))); }

  TiledProduct(const Linear& p, const Segments& s, long begin, long end)
      : s_(s), layout_(s, Tile::STEPS, Tile::HEIGHT), begin_(begin), rows_(end - begin), padded_(round_up(rows_, Tile::HEIGHT)) {
    static thread_local Scratch row_scratch, sum_scratch;
    bytes_ = row_scratch.get<uint8_t>(padded_ * layout_.depth());
    sums_ = sum_scratch.get<int32_t>((s.outlier ? 2 : 1) * padded_ * TILE_COLUMNS);
    pack_rows<OFFSET, Tile::STEPS>(p, s, layout_, begin, rows_, bytes_);
  }

  template <typename Done>
  void multiply(const int8_t* panel, Done done) const {
    int32_t* outlier = s_.outlier ? sums_ + padded_ * TILE_COLUMNS : nullptr;
    multiply_segment(panel, s_.normal, 0, sums_);
    if (outlier != nullptr) multiply_segment(panel + 4 * TILE_COLUMNS * s_.normal, s_.outlier, layout_.normal(), outlier);
    for (long row = 0; row < rows_; row += DONE_ROWS) {
      const int height = static_cast<int>(std::min(DONE_ROWS, rows_ - row));
      done(begin_ + row, height, sums_ + row * TILE_COLUMNS, outlier ? outlier + row * TILE_COLUMNS : nullptr);
    }
  }

 private:
  static constexpr long BLOCK_STEPS = 96;  // 24 KB of a panel
  static constexpr long DONE_ROWS = 24;    // whose results stay in the first-level cache while all their columns are written
  static_assert(BLOCK_STEPS % Tile::STEPS == 0 && TILE_ROWS % Tile::HEIGHT == 0);

  // sums [rows, TILE_COLUMNS] of a segment that begins at byte `first` of a packed row.
  void multiply_segment(const int8_t* panel, long all_steps, long first, int32_t* sums) const {
    std::memset(sums, 0, padded_ * TILE_COLUMNS * sizeof(int32_t));
    for (long k = 0; k < all_steps; k += BLOCK_STEPS, panel += 4 * TILE_COLUMNS * BLOCK_STEPS) {
      const long steps = std::min(BLOCK_STEPS, all_steps - k);
      for (long tile = 0; tile < rows_; tile += TILE_ROWS) {
        const long height = layout_.height(rows_, tile);
        multiply_tile(height, bytes_ + tile * layout_.depth() + (first + 4 * k) * height, panel, steps, sums + tile * TILE_COLUMNS);
      }
    }
  }

  static void multiply_tile(long height, const uint8_t* a, const int8_t* b, long steps, int32_t* c) {
    switch (height) {
      case 6: return Tile::template multiply<6>(a, b, steps, c);
      case 4: return Tile::template multiply<4>(a, b, steps, c);
      case 2: return Tile::template multiply<2>(a, b, steps, c);
    }
    if constexpr (Tile::HEIGHT == 1) {
      switch (height) {
        case 5: return Tile::template multiply<5>(a, b, steps, c);
        case 3: return Tile::template multiply<3>(a, b, steps, c);
        default: return Tile::template multiply<1>(a, b, steps, c);
      }
    }
  }

  Segments s_;
  RowLayout layout_;
  long begin_, rows_, padded_;
  uint8_t* bytes_;
  int32_t* sums_;
};

}  // namespace fxq
