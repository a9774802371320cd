// The product for AVX2, exact for any int8 weights. A block of a panel is looked at once for all rows and laid out for the
// fastest loop of tile_avx2.h that its weights allow:
//
// - narrow ones (all of a 4-bit layer) add up in int16 over several steps;
// - others are multiplied by pairs, and what a pair has too much goes to a list (excess_avx2.h);
// - where the list would be long, weights and rows are widened to int16.
//
// Packed weights are narrow, and are unpacked into blocks. Few rows are multiplied as the panel lies (few_rows_avx2.h,
// few_rows_packed_avx2.h), but for narrow weights that are not packed, which are soon laid out.
#pragma once

#include <immintrin.h>

#include "excess_avx2.h"
#include "few_rows_avx2.h"
#include "few_rows_packed_avx2.h"
#include "packed_rows.h"
#include "product.h"
#include "tile_avx2.h"
#include "vectors.h"

namespace fxq {

constexpr long FEW_ROWS = 16;    // at most, that are multiplied as the panel lies where its weights are wide,
constexpr long FEWEST_ROWS = 5;  // or any
constexpr long BLOCK_STEPS = 192;
constexpr int TILES = TILE_COLUMNS / 16;
constexpr long DONE_ROWS = 24;  // whose results stay in the first-level cache while all their columns are written
constexpr long MOST_EXCESS = 7;  // pairs a step, of 128: with more of them int16 is faster

// 16 columns of a block.
struct Block {
  alignas(64) int8_t values[BLOCK_STEPS * 64];
  alignas(64) int16_t words[BLOCK_STEPS * 64];
};

// The loops, by the number of steps that add up in int16.
enum Loop { PAIRS = 1, TWO = 2, FOUR = 4, EIGHT = 8, WORDS = 0 };

// Lays out `steps` rows of a panel, [steps][64 columns][4], from `channel` on and says which loop they are for; not for
// WORDS yet.
inline Loop lay_out(const int8_t* panel, long channel, long steps, Block* blocks, ExcessList& list) {
  __m256i seen = _mm256_setzero_si256();
  const long before = list.count(), most = before + MOST_EXCESS * steps;
  for (long k = 0; k < steps; k++) {
    for (int j = 0; j < 2 * TILES; j++) {
      const int8_t* from = panel + 4 * TILE_COLUMNS * k + 32 * j;
      // The block behind this one, while it is far away.
      if (j % 2 == 0) _mm_prefetch(reinterpret_cast<const char*>(from + 4 * TILE_COLUMNS * steps), _MM_HINT_T1);
      const __m256i w = load_bytes(from), over = excess(w);
      int8_t* to = blocks[j / 2].values + 64 * k + 32 * (j % 2);
      // w, or -1 - w where it is negative: the highest bit of all is that of the widest weight.
      seen = _mm256_or_si256(seen, _mm256_xor_si256(w, _mm256_cmpgt_epi8(_mm256_setzero_si256(), w)));
      if (_mm256_testz_si256(over, over)) {
        store_bytes(to, w);
        continue;
      }
      store_bytes(to, _mm256_sub_epi8(w, _mm256_and_si256(over, _mm256_set1_epi16(0xFF))));
      list.add(over, channel + 4 * k, 8 * j);
    }
    if (list.count() > most) {
      list.shorten(before);
      return WORDS;
    }
  }
  const auto within = [&](int mask) { return _mm256_testz_si256(seen, _mm256_set1_epi8(static_cast<char>(~mask))); };
  if (within(7)) return EIGHT;  // -8..7
  if (within(15)) return FOUR;
  if (within(31)) return TWO;
  return PAIRS;
}

// Lays out packed weights, [steps / 2][64 columns][4].
inline void lay_out_packed(const uint8_t* panel, long steps, Block* blocks) {
  for (long k = 0; k < steps; k += 2) {
    for (int j = 0; j < 2 * TILES; j++, panel += 32) {
      if (j % 2 == 0) _mm_prefetch(reinterpret_cast<const char*>(panel + 2 * TILE_COLUMNS * steps), _MM_HINT_T1);
      const TwoSteps w(panel);
      int8_t* to = blocks[j / 2].values + 64 * k + 32 * (j % 2);
      store_bytes(to, w.first);
      store_bytes(to + 64, w.second);
    }
  }
}

// The steps as int16, [2 * steps][16 columns][2]: the bytes go to the high halves and are shifted down.
inline void lay_out_words(const int8_t* panel, long steps, Block* blocks) {
  const __m256i first = _mm256_setr_epi8(-1, 0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1, 0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13);
  const __m256i second = _mm256_add_epi8(first, _mm256_set1_epi16(0x0200));
  for (long k = 0; k < TILES * steps; k++, panel += 64) {
    int16_t* to = blocks[k % TILES].words + k / TILES * 64;
    for (int half = 0; half < 2; half++) {
      const __m256i w = load_bytes(panel + 32 * half);
      store_bytes(to + 16 * half, _mm256_srai_epi16(_mm256_shuffle_epi8(w, first), 8));
      store_bytes(to + 32 + 16 * half, _mm256_srai_epi16(_mm256_shuffle_epi8(w, second), 8));
    }
  }
}

// Whether a panel begins with narrow weights.
inline bool begins_narrow(const int8_t* panel, long steps) {
  __m256i seen = _mm256_setzero_si256();
  for (long i = 0; i < std::min(4L, steps) * 4 * TILE_COLUMNS; i += 32) {
    const __m256i w = load_bytes(panel + i);
    seen = _mm256_or_si256(seen, _mm256_xor_si256(w, _mm256_cmpgt_epi8(_mm256_setzero_si256(), w)));
  }
  return _mm256_testz_si256(seen, _mm256_set1_epi8(~15));
}

class Product {
 public:
  static constexpr double LEAST_WORK = 1 << 22;
  static constexpr long ROWS = TILE_ROWS;
  static constexpr int OFFSET = 128;
  static constexpr bool READS_PACKED = true;

  // Their bytes stay in the second-level cache, or close to it, and so do their sums.
  static long most_rows(const Segments& s) { return std::max(192L, std::min(768L, (800L << 10) / std::max(1L, 4 * s.steps()))); }

  Product(const Linear& p, const Segments& s, long begin, long end) : p_(p), s_(s), begin_(begin), rows_(end - begin) {
    static thread_local Scratch sum_scratch, block_scratch, list_scratch;
    depth_ = 4 * s.steps();
    padded_ = round_up(rows_, ExcessList::ROWS);
    sums_ = sum_scratch.get<int32_t>((s.outlier ? 2 : 1) * padded_ * TILE_COLUMNS);
    if (rows_ <= FEWEST_ROWS && p.packed) few_bytes_ = few_rows<uint8_t>();
    if (rows_ <= FEW_ROWS && !p.packed) few_ = few_rows<int16_t>();
    if (rows_ <= FEWEST_ROWS) return;
    blocks_ = block_scratch.get<Block>(TILES);
    list_ = new (list_scratch.get<ExcessList>(1)) ExcessList;
    static thread_local Scratch row_scratch;
    bytes_ = row_scratch.get<uint8_t>(rows_ * depth_);
    pack_rows<OFFSET>(p, s, RowLayout(s, 1, 1), begin, rows_, bytes_);
  }

  template <typename Done>
  void multiply(const int8_t* panel, Done done) {
    int32_t* outlier = s_.outlier ? sums_ + padded_ * TILE_COLUMNS : nullptr;
    multiply_segment(panel, 0, s_.normal, sums_);
    if (outlier != nullptr) multiply_segment(panel, s_.normal, s_.steps(), outlier);
    for (long row = 0; row < rows_; row += DONE_ROWS) {
      const int height = static_cast<int>(std::min(DONE_ROWS, rows_ - row));
      done(begin_ + row, height, sums_ + row * TILE_COLUMNS, outlier ? outlier + row * TILE_COLUMNS : nullptr);
    }
  }

 private:
  // f(a row's int8 of a segment, its channels, where the segment begins in a packed row).
  template <typename F>
  void each_segment(long row, F f) const {
    fxq::each_segment(p_, s_, begin_ + row, [&](const int8_t* from, long width, bool outlier) {
      f(from, width, outlier ? 4 * s_.normal : 0);
    });
  }

  long tile_rows(long tile) const { return std::min<long>(TILE_ROWS, rows_ - tile); }

  // [rows][depth] unsigned, for few of them.
  template <typename T>
  T* few_rows() const {
    static thread_local Scratch scratch;
    T* found = scratch.get<T>(rows_ * depth_);
    for (long row = 0; row < rows_; row++) {
      each_segment(row, [&](const int8_t* from, long width, long first) {
        T* to = found + row * depth_ + first;
        for (long k = 0; k < width; k++) to[k] = static_cast<T>(from[k] + 128);
        std::fill(to + width, to + round_up(width, 4), static_cast<T>(0));
      });
    }
    return found;
  }

  // The packed rows as int16, two channels to a step.
  const int16_t* tile_words() {
    if (words_ != nullptr) return words_;
    static thread_local Scratch scratch;
    words_ = scratch.get<int16_t>(rows_ * depth_);
    for (long tile = 0; tile < rows_; tile += TILE_ROWS) {
      const long height = tile_rows(tile);
      for (long k = 0; k < s_.steps(); k++) {
        const uint8_t* from = bytes_ + tile * depth_ + 4 * k * height;
        int16_t* to = words_ + tile * depth_ + 4 * k * height;
        for (long i = 0; i < height; i++) {
          to[2 * i] = from[4 * i];
          to[2 * i + 1] = from[4 * i + 1];
          to[2 * (height + i)] = from[4 * i + 2];
          to[2 * (height + i) + 1] = from[4 * i + 3];
        }
      }
    }
    return words_;
  }

  // The rows' unsigned bytes, transposed: [depth][padded rows].
  const uint8_t* columns() {
    if (columns_ != nullptr) return columns_;
    static thread_local Scratch scratch;
    columns_ = scratch.get<uint8_t>(padded_ * depth_);
    each_segment(0, [&](const int8_t* from, long width, long first) {
      transpose(from, p_.q_stride, rows_, width, columns_ + first * padded_, padded_);
    });
    return columns_;
  }

  // sums [rows, TILE_COLUMNS] of the steps from `first` to `last`.
  void multiply_segment(const int8_t* panel, long first, long last, int32_t* sums) {
    if (p_.packed) return multiply_packed(reinterpret_cast<const uint8_t*>(panel), first, last, sums);
    const int8_t* begin = panel + 4 * TILE_COLUMNS * first;
    if (rows_ <= FEWEST_ROWS || (rows_ <= FEW_ROWS && !begins_narrow(begin, last - first))) {
      static thread_local Scratch scratch;
      auto* pairs = scratch.get<int32_t>(2 * TILE_COLUMNS * rows_);
      return multiply_few_rows(few_ + 4 * first, depth_, rows_, begin, last - first, pairs, sums);
    }
    std::memset(sums, 0, rows_ * TILE_COLUMNS * sizeof(int32_t));
    for (long k = first; k < last; k += BLOCK_STEPS) {
      const long steps = std::min(BLOCK_STEPS, last - k);
      const int8_t* from = panel + 4 * TILE_COLUMNS * k;
      const Loop loop = lay_out(from, 4 * k, steps, blocks_, *list_);
      if (loop == WORDS) lay_out_words(from, steps, blocks_);
      for (int j = 0; j < TILES; j++) multiply_block(loop, blocks_[j], k, steps, sums + 16 * j);
      const bool full = list_->count() + MOST_EXCESS * BLOCK_STEPS + 2 * TILE_COLUMNS > ExcessList::MOST;
      if (list_->count() && (full || k + steps == last)) list_->multiply(columns(), padded_, rows_, sums);
    }
  }

  void multiply_packed(const uint8_t* panel, long first, long last, int32_t* sums) {
    std::memset(sums, 0, rows_ * TILE_COLUMNS * sizeof(int32_t));
    panel += 2 * TILE_COLUMNS * first;
    if (rows_ <= FEWEST_ROWS) return multiply_few_packed(few_bytes_ + 4 * first, depth_, rows_, panel, last - first, sums);
    for (long k = first; k < last; k += BLOCK_STEPS) {
      const long steps = std::min(BLOCK_STEPS, last - k);
      lay_out_packed(panel + 2 * TILE_COLUMNS * (k - first), steps, blocks_);
      for (int j = 0; j < TILES; j++) multiply_block(EIGHT, blocks_[j], k, steps, sums + 16 * j);
    }
  }

  void multiply_block(Loop loop, const Block& b, long first, long steps, int32_t* sums) {
    const int16_t* words = loop == WORDS ? tile_words() : nullptr;
    for (long tile = 0; tile < rows_; tile += TILE_ROWS) {
      const long at = tile * depth_ + 4 * first * tile_rows(tile);
      int32_t* c = sums + tile * TILE_COLUMNS;
      switch (tile_rows(tile)) {
        case 6: multiply_tile<6>(loop, bytes_ + at, words + at, b, steps, c); break;
        case 5: multiply_tile<5>(loop, bytes_ + at, words + at, b, steps, c); break;
        case 4: multiply_tile<4>(loop, bytes_ + at, words + at, b, steps, c); break;
        case 3: multiply_tile<3>(loop, bytes_ + at, words + at, b, steps, c); break;
        case 2: multiply_tile<2>(loop, bytes_ + at, words + at, b, steps, c); break;
        default: multiply_tile<1>(loop, bytes_ + at, words + at, b, steps, c);
      }
    }
  }

  template <int R>
  static void multiply_tile(Loop loop, const uint8_t* a, const int16_t* words, const Block& b, long steps, int32_t* c) {
    switch (loop) {
      case WORDS: return multiply_words<R>(words, b.words, 2 * steps, c);
      case EIGHT: return multiply_narrow<R, 8>(a, b.values, steps, c);
      case FOUR: return multiply_narrow<R, 4>(a, b.values, steps, c);
      case TWO: return multiply_narrow<R, 2>(a, b.values, steps, c);
      default: return multiply_pairs<R>(a, b.values, steps, c);
    }
  }

  const Linear& p_;
  Segments s_;
  long begin_, rows_, depth_, padded_;
  uint8_t *bytes_ = nullptr, *columns_ = nullptr, *few_bytes_ = nullptr;
  int16_t *few_ = nullptr, *words_ = nullptr;
  int32_t* sums_;
  Block* blocks_ = nullptr;
  ExcessList* list_ = nullptr;
};

}  // namespace fxq
