// The product for AMX: two tiles of 16 rows times two tiles of 16 columns, whose sums stay in tile registers over all
// channels of a segment. Sixteen steps of a panel, 64 channels, are four tiles of weights as they lie.
#pragma once

#include <immintrin.h>

#include "product.h"
#include "tile_amx.h"

namespace fxq {

class Product {
 public:
  static constexpr double LEAST_WORK = 1 << 24;
  static constexpr long ROWS = 32;
  static constexpr int OFFSET = 128;
  static constexpr bool READS_PACKED = true;

  // Their bytes and two panels stay in the second-level cache, or close to it.
  static long most_rows(const Segments& s) {
    return std::max(192L, std::min(1024L, (512L << 10) / std::max(1L, 4 * s.steps()) / ROWS * ROWS));
  }

  Product(const Linear& p, const Segments& s, long begin, long end)
      : normal_{0, s.normal}, outlier_{s.normal, s.outlier}, panel_steps_(s.steps() + 2), begin_(begin), end_(end) {
    static thread_local Scratch row_scratch, rest_scratch, wide_scratch;
    if (p.packed) {
      packed_bytes_ = (s.panel_rows() + 2) * 4 * TILE_COLUMNS;
      packed_end_ = static_cast<const int8_t*>(p.panels) + ceil_div(p.outputs, TILE_COLUMNS) * packed_bytes_;
      wide_ = wide_scratch.get<int8_t>(2 * panel_steps_ * 4 * TILE_COLUMNS);
    }
    group_ = ROWS * CHANNELS * (normal_.blocks() + outlier_.blocks());
    rows_ = row_scratch.get<uint8_t>(ceil_div(end - begin, ROWS) * group_);
    rest_ = rest_scratch.get<int8_t>(2 * BLOCK);
    pack(p);
  }
  Product(const Product&) = delete;
  Product& operator=(const Product&) = delete;

  template <typename Done>
  void multiply(const int8_t* panel, Done done) {
    alignas(64) int32_t sums[2][ROWS * TILE_COLUMNS];
    Ahead ahead = packed_bytes_ ? unpack(panel) : ahead_of(panel);
    const Weights normal = weights(panel, normal_, rest_), outlier = weights(panel, outlier_, rest_ + BLOCK);
    for (long row = begin_; row < end_; row += ROWS) {
      const uint8_t* a = rows_ + (row - begin_) / ROWS * group_;
      const long height = std::min(ROWS, end_ - row);
      multiply_group(a, normal, height, ahead, sums[0]);
      if (outlier_.steps) multiply_group(a + ROWS * CHANNELS * normal_.blocks(), outlier, height, ahead, sums[1]);
      // Sixteen at a time: more rows of the result do not stay in the first-level cache.
      for (long i = 0; i < height; i += 16) {
        const int32_t* outlier_sums = outlier_.steps ? sums[1] + i * TILE_COLUMNS : nullptr;
        done(row + i, static_cast<int>(std::min(16L, height - i)), sums[0] + i * TILE_COLUMNS, outlier_sums);
      }
    }
  }

 private:
  static constexpr long CHANNELS = 64, BLOCK_STEPS = CHANNELS / 4, BLOCK = BLOCK_STEPS * 4 * TILE_COLUMNS;

  struct Part {
    long first, steps;

    long blocks() const { return ceil_div(steps, BLOCK_STEPS); }
  };

  // A segment of a panel: blocks of 64 channels, of which the last may lie elsewhere.
  struct Weights {
    const int8_t* begin;
    long blocks;
    const int8_t* last;
  };

  // The panel behind this one, a few lines at a time: brought closer, or where it is packed widened to `wide`.
  struct Ahead {
    const char* next;
    long lines;
    int8_t* wide = nullptr;
    long line = 0, last = 0;

    void fetch() {
      if (wide != nullptr) return widen_lines();
      for (long i = 0; i < lines; i++, next += 64) _mm_prefetch(next, _MM_HINT_T1);
    }
    void widen_lines() {
      const __m512i half = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
      for (const long end = std::min(line + lines, last); line < end; line++) {
        const char* from = next + 64 * line;
        _mm_prefetch(from + 4096, _MM_HINT_T0);
        const __m512i w = _mm512_loadu_si512(from);
        int8_t* to = wide + line / 4 * 8 * TILE_COLUMNS + 64 * (line % 4);
        _mm512_store_si512(to, _mm512_sub_epi8(_mm512_and_si512(w, half), eight));
        _mm512_store_si512(to + 4 * TILE_COLUMNS, _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(w, 4), half), eight));
      }
    }
  };

  // A panel that few rows go over is read as fast as memory gives it, in the order that the CPU foresees.
  Ahead ahead_of(const int8_t* panel) const {
    const long rows = end_ - begin_, lines = rows <= 16 ? 0 : 32 / ceil_div(rows, ROWS) + 1;
    return {reinterpret_cast<const char*>(panel) + panel_steps_ * 4 * TILE_COLUMNS, lines};
  }

  // Makes `panel` the widened one, which the call before has made of it unless it is the first, and says how the next
  // one is widened meanwhile.
  Ahead unpack(const int8_t*& panel) {
    const long rows = end_ - begin_, groups = rows / ROWS * 2 + (rows % ROWS > 16 ? 2 : rows % ROWS > 0 ? 1 : 0);
    const long lines = (packed_bytes_ - 8 * TILE_COLUMNS) / 64, fetches = groups * (normal_.blocks() + outlier_.blocks());
    int8_t* const buffers[2] = {wide_, wide_ + panel_steps_ * 4 * TILE_COLUMNS};
    const int8_t* next = panel + packed_bytes_;
    if (panel != widened_) Ahead{reinterpret_cast<const char*>(panel), lines, buffers[turn_], 0, lines}.fetch();
    panel = buffers[turn_];
    turn_ = 1 - turn_;
    widened_ = next;
    return {reinterpret_cast<const char*>(next), ceil_div(lines, fetches), buffers[turn_], 0, next < packed_end_ ? lines : 0};
  }

  // The steps behind a segment meet bytes of zero in the rows, so any will do that may be read.
  Weights weights(const int8_t* panel, const Part& part, int8_t* rest) const {
    if (part.steps == 0) return {nullptr, 0, nullptr};
    const long before = (part.blocks() - 1) * BLOCK_STEPS, first = part.first + before;
    const int8_t* last = panel + first * 4 * TILE_COLUMNS;
    if (first + BLOCK_STEPS > panel_steps_) {
      std::memset(rest, 0, BLOCK);
      std::memcpy(rest, last, (part.steps - before) * 4 * TILE_COLUMNS);
      last = rest;
    }
    return {panel + part.first * 4 * TILE_COLUMNS, part.blocks(), last};
  }

  // Rows as unsigned bytes [groups of 32 rows][blocks of 64 channels][32][64], zero behind a segment's channels and
  // behind the last row.
  void pack(const Linear& p) {
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
    const auto copy = [&](const int8_t* from, uint8_t* to, long width) {
      for (; width >= CHANNELS; width -= CHANNELS, from += CHANNELS, to += ROWS * CHANNELS) {
        _mm512_store_si512(to, _mm512_xor_si512(_mm512_loadu_si512(from), flip));
      }
      if (width == 0) return;
      const __mmask64 mask = (1ull << width) - 1;
      _mm512_store_si512(to, _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, from), _mm512_maskz_mov_epi8(mask, flip)));
    };
    for (long row = begin_; row < end_; row++) {
      const long at = row - begin_;
      uint8_t* to = rows_ + at / ROWS * group_ + at % ROWS * CHANNELS;
      const int8_t* from = p.q + row * p.q_stride;
      copy(from, to, p.split);
      copy(from + p.split, to + ROWS * CHANNELS * normal_.blocks(), p.width - p.split);
    }
    for (long at = end_ - begin_; at % ROWS != 0; at++) {
      uint8_t* to = rows_ + at / ROWS * group_ + at % ROWS * CHANNELS;
      for (long k = 0; k < group_; k += ROWS * CHANNELS) std::memset(to + k, 0, CHANNELS);
    }
  }

  static void multiply_group(const uint8_t* a, const Weights& w, long height, Ahead& ahead, int32_t* sums) {
    // The compiler does not know what tiles are loaded from.
    asm volatile("" ::: "memory");
    if (height <= 16) return multiply_16_rows(a, w, ahead, sums);
    for (int column = 0; column < TILE_COLUMNS; column += 32) {
      const uint8_t* rows = a;
      const int8_t* b = w.begin + 4 * column;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (long k = w.blocks; k > 0; k--, rows += ROWS * CHANNELS, b += BLOCK) {
        if (k == 1) b = w.last + 4 * column;
        ahead.fetch();
        _tile_loadd(4, rows, 64);
        _tile_loadd(6, b, 256);
        _tile_loadd(7, b + 64, 256);
        _tile_loadd(5, rows + 1024, 64);
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
      }
      int32_t* c = sums + column;
      _tile_stored(0, c, 256);
      _tile_stored(1, c + 16, 256);
      _tile_stored(2, c + 16 * TILE_COLUMNS, 256);
      _tile_stored(3, c + 16 * TILE_COLUMNS + 16, 256);
    }
  }

  static void multiply_16_rows(const uint8_t* rows, const Weights& w, Ahead& ahead, int32_t* sums) {
    const int8_t* b = w.begin;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long k = w.blocks; k > 0; k--, rows += ROWS * CHANNELS, b += BLOCK) {
      if (k == 1) b = w.last;
      ahead.fetch();
      _tile_loadd(4, rows, 64);
      _tile_loadd(5, b, 256);
      _tile_loadd(6, b + 64, 256);
      _tile_loadd(7, b + 128, 256);
      _tile_dpbusd(0, 4, 5);
      _tile_dpbusd(1, 4, 6);
      _tile_loadd(5, b + 192, 256);
      _tile_dpbusd(2, 4, 7);
      _tile_dpbusd(3, 4, 5);
    }
    _tile_stored(0, sums, 256);
    _tile_stored(1, sums + 16, 256);
    _tile_stored(2, sums + 32, 256);
    _tile_stored(3, sums + 48, 256);
  }

  const TileSession session_;
  Part normal_, outlier_;
  long panel_steps_, begin_, end_, group_;
  uint8_t* rows_;
  int8_t *rest_, *wide_ = nullptr;
  const int8_t *packed_end_ = nullptr, *widened_ = nullptr;
  long packed_bytes_ = 0;  // of a panel; 0: they are not packed
  int turn_ = 0;
};

}  // namespace fxq
