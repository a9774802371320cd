// The product for AVX2, exact for any int8 weights. A block of a panel is looked at once for all rows and laid out for the
// fastest loop of tile_avx2.h that its weights allow:
//
// - narrow ones (all of a 4-bit layer) add up in int16 over several steps;
// - others are split where two neighbours would saturate: such a pair gives its excess over +-128 to a rest, which is
//   multiplied in a second loop over those places alone;
// - where there are many rests, weights and rows are widened to int16.
#pragma once

#include <immintrin.h>

#include "product.h"
#include "tile_avx2.h"
#include "vectors.h"

namespace fxq {

constexpr long BLOCK_STEPS = 192;
constexpr int TILES = TILE_COLUMNS / 16;
constexpr long DONE_ROWS = 24;  // whose results stay in the first-level cache while all their columns are written

// 16 columns of a block.
struct Block {
  alignas(64) int8_t values[BLOCK_STEPS * 64];
  alignas(64) int16_t words[BLOCK_STEPS * 64];
  struct Rest {  // of 8 columns
    alignas(32) int8_t values[BLOCK_STEPS * 32];
    int16_t places[BLOCK_STEPS];
    long count;
  } rests[2];
};

// The loops, by the number of steps that add up in int16.
enum Loop { PAIRS = 1, TWO = 2, FOUR = 4, EIGHT = 8, WORDS = 0 };

// What two neighbours of one sign are more than 128 together, 16 times int16. It is at most as large as the first of
// them, since the second is within +-128: the first keeps its sign without it, or is 0, and the pair is 128 then.
inline __m256i excess(__m256i w) {
  const __m256i sum = _mm256_maddubs_epi16(_mm256_set1_epi8(1), w);
  const __m256i fitting = _mm256_max_epi16(_mm256_min_epi16(sum, _mm256_set1_epi16(128)), _mm256_set1_epi16(-128));
  return _mm256_sub_epi16(sum, fitting);
}

// Lays out `steps` rows of a panel, [steps][64 columns][4], and says which loop they are for; not for WORDS yet.
inline Loop lay_out(const int8_t* panel, long steps, Block* blocks) {
  __m256i seen = _mm256_setzero_si256();
  long rests = 0;
  for (int i = 0; i < TILES; i++) blocks[i].rests[0].count = blocks[i].rests[1].count = 0;
  for (long k = 0; k < steps; k++) {
    for (int j = 0; j < 2 * TILES; j++) {
      const int8_t* from = panel + 4 * TILE_COLUMNS * k + 32 * j;
      // The block behind this one, while it is far away.
      if (j % 2 == 0) _mm_prefetch(reinterpret_cast<const char*>(from + 4 * TILE_COLUMNS * steps), _MM_HINT_T1);
      Block& block = blocks[j / 2];
      const __m256i w = load_bytes(from), over = excess(w);
      int8_t* to = block.values + 64 * k + 32 * (j % 2);
      // w, or -1 - w where it is negative: the highest bit of all is that of the widest weight.
      seen = _mm256_or_si256(seen, _mm256_xor_si256(w, _mm256_cmpgt_epi8(_mm256_setzero_si256(), w)));
      if (_mm256_testz_si256(over, over)) {
        store_bytes(to, w);
        continue;
      }
      Block::Rest& rest = block.rests[j % 2];
      const __m256i first = _mm256_and_si256(over, _mm256_set1_epi16(0xFF));  // in the place of the first
      store_bytes(to, _mm256_sub_epi8(w, first));
      store_bytes(rest.values + 32 * rest.count, first);
      rest.places[rest.count++] = static_cast<int16_t>(k);
      rests++;
    }
  }
  const auto within = [&](int mask) { return _mm256_testz_si256(seen, _mm256_set1_epi8(static_cast<char>(~mask))); };
  if (within(7)) return EIGHT;  // -8..7
  if (within(15)) return FOUR;
  if (within(31)) return TWO;
  return 4 * rests > 2 * TILES * steps ? WORDS : PAIRS;
}

// The same as int16, [2 * steps][16 columns][2]: the bytes go to the high halves and are shifted down.
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

class Product {
 public:
  static constexpr double LEAST_WORK = 1 << 22;

  // Their bytes stay in the second-level cache, or close to it, and so do their sums.
  static long most_rows(const Segments& s) { return std::max(192L, std::min(768L, (800L << 10) / std::max(1L, 4 * s.steps()))); }

  Product(const Linear& p, const Segments& s, long begin, long end) : s_(s), begin_(begin), rows_(end - begin) {
    static thread_local Scratch byte_scratch, sum_scratch, block_scratch;
    depth_ = 4 * s.steps();
    bytes_ = byte_scratch.get<uint8_t>(rows_ * depth_);
    sums_ = sum_scratch.get<int32_t>((s.outlier ? 2 : 1) * rows_ * TILE_COLUMNS);
    blocks_ = block_scratch.get<Block>(TILES);
    for (long row = 0; row < rows_; row++) {
      const int8_t* from = p.q + (begin + row) * p.q_stride;
      pack(from, p.split, row, 0);
      pack(from + p.split, p.width - p.split, row, s.normal);
    }
  }

  template <typename Done>
  void multiply(const int8_t* panel, Done done) {
    int32_t* outlier = s_.outlier ? sums_ + rows_ * TILE_COLUMNS : nullptr;
    std::memset(sums_, 0, (outlier ? 2 : 1) * rows_ * TILE_COLUMNS * sizeof(int32_t));
    multiply_segment(panel, 0, s_.normal, sums_);
    if (outlier != nullptr) multiply_segment(panel, s_.normal, s_.steps(), outlier);
    for (long row = 0; row < rows_; row += DONE_ROWS) {
      const int height = static_cast<int>(std::min(DONE_ROWS, rows_ - row));
      done(begin_ + row, height, sums_ + row * TILE_COLUMNS, outlier ? outlier + row * TILE_COLUMNS : nullptr);
    }
  }

 private:
  long tile_rows(long tile) const { return std::min<long>(TILE_ROWS, rows_ - tile); }

  // A segment of a row from step `first` on, as unsigned bytes, between the other rows of its tile. The last step is
  // filled up with what meets weights of zero.
  void pack(const int8_t* from, long width, long row, long first) {
    const long tile = row / TILE_ROWS * TILE_ROWS, step = tile_rows(tile);
    uint8_t* to = bytes_ + tile * depth_ + 4 * (first * step + row - tile);
    const auto put = [&](const int8_t* four) __attribute__((always_inline)) {
      uint32_t word;
      std::memcpy(&word, four, sizeof(word));
      word ^= 0x80808080u;
      std::memcpy(to, &word, sizeof(word));
      to += 4 * step;
    };
    long k = 0;
    for (; k + 4 <= width; k += 4) put(from + k);
    if (k == width) return;
    int8_t last[4] = {};
    std::memcpy(last, from + k, width - k);
    put(last);
  }

  // The rows as int16, two channels to a step.
  const int16_t* words() {
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

  void multiply_segment(const int8_t* panel, long first, long last, int32_t* sums) {
    for (long k = first; k < last; k += BLOCK_STEPS) {
      const long steps = std::min(BLOCK_STEPS, last - k);
      const int8_t* from = panel + 4 * TILE_COLUMNS * k;
      const Loop loop = lay_out(from, steps, blocks_);
      if (loop == WORDS) lay_out_words(from, steps, blocks_);
      for (int j = 0; j < TILES; j++) multiply_block(loop, blocks_[j], k, steps, sums + 16 * j);
    }
  }

  void multiply_block(Loop loop, const Block& b, long first, long steps, int32_t* sums) {
    const int16_t* wide = loop == WORDS ? words() : nullptr;
    for (long tile = 0; tile < rows_; tile += TILE_ROWS) {
      const long at = tile * depth_ + 4 * first * tile_rows(tile);
      int32_t* c = sums + tile * TILE_COLUMNS;
      switch (tile_rows(tile)) {
        case 6: multiply_tile<6>(loop, bytes_ + at, wide + at, b, steps, c); break;
        case 5: multiply_tile<5>(loop, bytes_ + at, wide + at, b, steps, c); break;
        case 4: multiply_tile<4>(loop, bytes_ + at, wide + at, b, steps, c); break;
        case 3: multiply_tile<3>(loop, bytes_ + at, wide + at, b, steps, c); break;
        case 2: multiply_tile<2>(loop, bytes_ + at, wide + at, b, steps, c); break;
        default: multiply_tile<1>(loop, bytes_ + at, wide + at, b, steps, c);
      }
    }
  }

  template <int R>
  static void multiply_tile(Loop loop, const uint8_t* a, const int16_t* wide, const Block& b, long steps, int32_t* c) {
    switch (loop) {
      case WORDS: return multiply_words<R>(wide, b.words, 2 * steps, c);
      case EIGHT: return multiply_narrow<R, 8>(a, b.values, steps, c);
      case FOUR: return multiply_narrow<R, 4>(a, b.values, steps, c);
      case TWO: return multiply_narrow<R, 2>(a, b.values, steps, c);
      default: multiply_pairs<R>(a, b.values, steps, c);
    }
    for (int half = 0; half < 2; half++) {
      const Block::Rest& rest = b.rests[half];
      if (rest.count) multiply_rest<R>(a, rest.values, rest.places, rest.count, c + 8 * half);
    }
  }

  Segments s_;
  long begin_, rows_, depth_;
  uint8_t* bytes_;
  int16_t* words_ = nullptr;
  int32_t* sums_;
  Block* blocks_;
};

}  // namespace fxq
