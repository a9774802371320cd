// Flash attention in bfloat16 for AVX512 BF16, with float32 sums, for caches of any length in any number of pieces.
//
// Per batch and head the keys and values are packed once into the panels that the tile reads; blocks of queries then run
// over blocks of keys: scores by bfloat16 products, one pass for maximum and exp, and a second product that accumulates.
#include <cstring>
#include <limits>

#include "calls.h"
#include "product.h"
#include "unpack.h"
#include "vectors.h"

using namespace fxq;

namespace {

constexpr long BLOCK_ROWS = 192, BLOCK_KEYS = 256;
constexpr double HEAD_WORK = 1 << 22;  // multiply-adds of one product a thread
constexpr float LOWEST = -3.0e38f;

struct Shape {
  long pairs;     // dwords along the head: two channels each
  long columns;   // panels of 64 channels of the head
  long keys, blocks;

  long key_block() const { return BLOCK_KEYS * pairs * 2; }           // elements of a block of packed keys
  long value_block() const { return BLOCK_KEYS * columns * TILE_COLUMNS; }
};

// Channels of a value: of encoded ones coefficients, where these are read.
long value_size(const Attention& p) { return p.span == nullptr ? p.size : p.span->values.size; }

// One row of keys or values of a piece, or null past the end.
struct Source {
  const Attention& p;
  long batch, head;
  mutable long piece = 0, start = 0;

  const Piece* find(long key) const {  // keys are asked for in ascending order
    while (piece < p.piece_count && key >= start + p.pieces[piece].length) start += p.pieces[piece++].length;
    return piece < p.piece_count ? p.pieces + piece : nullptr;
  }
  const bfloat16* k(long key) const {
    const Piece* found = find(key);
    return found ? found->k + batch * found->k_batch + (key - start) * found->k_row + head * found->k_head : nullptr;
  }
  const bfloat16* v(long key) const {
    const Piece* found = find(key);
    return found ? found->v + batch * found->v_batch + (key - start) * found->v_row + head * found->v_head : nullptr;
  }
};

// Keys to [BLOCK_KEYS / 64][pairs][64][2].
void pack_keys(const Attention& p, const Shape& s, long batch, long head, long block, bfloat16* to) {
  const Source source{p, batch, head};
  const long full = p.size / 2;
  for (long key = 0; key < BLOCK_KEYS; key++) {
    const bfloat16* row = source.k(block * BLOCK_KEYS + key);
    auto* target = reinterpret_cast<uint32_t*>(to) + key / 64 * s.pairs * 64 + key % 64;
    for (long d = 0; d < full; d++) {
      uint32_t pair = 0;
      if (row != nullptr) std::memcpy(&pair, row + 2 * d, 4);
      target[d * 64] = pair;
    }
    if (p.size % 2) target[full * 64] = row != nullptr ? row[p.size - 1] : 0;
  }
}

// Values to [columns][BLOCK_KEYS / 2][64][2]: two keys next to each other.
void pack_values(const Attention& p, const Shape& s, long batch, long head, long block, bfloat16* to) {
  const Source source{p, batch, head};
  for (long key = 0; key < BLOCK_KEYS; key += 2) {
    const bfloat16* first = source.v(block * BLOCK_KEYS + key);
    const bfloat16* second = first == nullptr ? nullptr : source.v(block * BLOCK_KEYS + key + 1);
    for (long d = 0; d < s.columns * 64; d += 16) {
      const __mmask16 mask = lanes(p.size - d);
      const __m512i low = first ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, first + d)) : _mm512_setzero_si512();
      const __m512i high = second ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, second + d)) : _mm512_setzero_si512();
      bfloat16* target = to + (d / 64 * (BLOCK_KEYS / 2) + key / 2) * 128 + d % 64 * 2;
      _mm512_storeu_si512(target, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}

struct Block {  // scratch of one block of queries
  bfloat16* q;         // [BLOCK_ROWS, 2 * pairs]
  float* scores;       // [BLOCK_ROWS, BLOCK_KEYS]
  bfloat16* weights;   // [BLOCK_ROWS, BLOCK_KEYS]
  float* out;          // [BLOCK_ROWS, 64 * columns]
  float* maximum;      // [BLOCK_ROWS], of scores times the softmax scale
  float* total;        // [BLOCK_ROWS]
};

// Scores of one row to weights; rescales what the row has summed up so far.
void soften(const Block& b, long row, long keys, long width, float scale) {
  const float* scores = b.scores + row * BLOCK_KEYS;
  __m512 top = _mm512_set1_ps(LOWEST);
  for (long k = 0; k < keys; k += 16) {
    const __mmask16 mask = lanes(keys - k);
    top = _mm512_mask_max_ps(top, mask, top, load(scores + k, mask));
  }
  const float before = b.maximum[row], now = std::max(before, _mm512_reduce_max_ps(top) * scale);
  const __m512 center = _mm512_set1_ps(-now), factor = _mm512_set1_ps(scale);
  __m512 total = _mm512_setzero_ps();
  bfloat16* weights = b.weights + row * BLOCK_KEYS;
  for (long k = 0; k < BLOCK_KEYS; k += 16) {
    const __mmask16 mask = lanes(keys - k);
    const __m512 weight = _mm512_maskz_mov_ps(mask, exp(_mm512_fmadd_ps(load(scores + k), factor, center)));
    total = _mm512_add_ps(total, weight);
    store(weights + k, weight);
  }
  if (now != before) {
    const __m512 shrink = exp(_mm512_set1_ps(before - now));
    b.total[row] *= _mm512_cvtss_f32(shrink);
    float* out = b.out + row * width;
    for (long d = 0; d < width; d += 16) store(out + d, _mm512_mul_ps(load(out + d), shrink));
    b.maximum[row] = now;
  }
  b.total[row] += _mm512_reduce_add_ps(total);
}

void attend(const Attention& p, const Shape& s, const Block& b, long rows, const bfloat16* keys, const bfloat16* values) {
  const long width = s.columns * TILE_COLUMNS;
  const float scale = 1.0f / std::sqrt(static_cast<float>(p.size));
  for (long block = 0; block < s.blocks; block++) {
    const long count = std::min(BLOCK_KEYS, s.keys - block * BLOCK_KEYS);
    const bfloat16 *k = keys + block * s.key_block(), *v = values + block * s.value_block();
    for (long panel = 0; panel < ceil_div(count, TILE_COLUMNS); panel++) {
      for (long row = 0; row < rows; row += TILE_ROWS) {
        multiply_bfloat16(b.q + row * s.pairs * 2, s.pairs * 4, k + panel * s.pairs * 128, s.pairs,
                          b.scores + row * BLOCK_KEYS + panel * TILE_COLUMNS, BLOCK_KEYS * 4);
      }
    }
    for (long row = 0; row < rows; row++) soften(b, row, count, width, scale);
    const long steps = ceil_div(count, 2);
    for (long panel = 0; panel < s.columns; panel++) {
      for (long row = 0; row < rows; row += TILE_ROWS) {
        add_multiply_bfloat16(b.weights + row * BLOCK_KEYS, BLOCK_KEYS * 2, v + panel * (BLOCK_KEYS / 2) * 128, steps,
                              b.out + row * width + panel * TILE_COLUMNS, width * 4);
      }
    }
  }
}

void pack(const Attention& p, const Shape& s, long batch, long head, long block, bfloat16* keys, bfloat16* values) {
  if (p.span == nullptr) {
    pack_keys(p, s, batch, head, block, keys);
    pack_values(p, s, batch, head, block, values);
    return;
  }
  const Tile<bfloat16> tile(*p.span, batch, head, block * BLOCK_KEYS, std::min(BLOCK_KEYS, s.keys - block * BLOCK_KEYS));
  pack_keys(tile.call(p.size), s, 0, 0, 0, keys);
  pack_values(tile.call(value_size(p)), s, 0, 0, 0, values);
}

void query_block(const Attention& p, const Shape& s, long batch, long head, long begin, const bfloat16* keys,
                 const bfloat16* values) {
  static thread_local Scratch q, scores, weights, out, maximum, total;
  const long width = s.columns * TILE_COLUMNS, rows = std::min(BLOCK_ROWS, p.rows - begin), size = value_size(p);
  const Block b{q.get<bfloat16>(BLOCK_ROWS * s.pairs * 2), scores.get<float>(BLOCK_ROWS * BLOCK_KEYS),
                weights.get<bfloat16>(BLOCK_ROWS * BLOCK_KEYS), out.get<float>(BLOCK_ROWS * width),
                maximum.get<float>(BLOCK_ROWS), total.get<float>(BLOCK_ROWS)};
  const long padded = round_up(rows, TILE_ROWS);
  std::memset(b.q, 0, padded * s.pairs * 4);
  std::memset(b.out, 0, padded * width * 4);
  for (long i = 0; i < rows; i++) {
    std::memcpy(b.q + i * s.pairs * 2, p.q + batch * p.q_batch + (begin + i) * p.q_row + head * p.q_head, p.size * 2);
    b.maximum[i] = LOWEST;
    b.total[i] = 0;
  }
  attend(p, s, b, rows, keys, values);
  for (long i = 0; i < rows; i++) {
    const long place = (batch * p.rows + begin + i) * p.heads + head;
    const __m512 inverse = _mm512_set1_ps(1.0f / b.total[i]);
    for (long d = 0; d < size; d += 16) {
      const __m512 result = _mm512_mul_ps(load(b.out + i * width + d), inverse);
      if (p.out != nullptr) {
        store(p.out + place * size + d, result, lanes(size - d));
      } else {
        store(p.part + place * size + d, result, lanes(size - d));
      }
    }
    if (p.lse != nullptr) p.lse[place] = b.maximum[i] + std::log(b.total[i]);
  }
}

}  // namespace

namespace {

void run(const Attention& p) {
  Shape s{ceil_div(p.size, 2), ceil_div(value_size(p), TILE_COLUMNS), 0, 0};
  for (long i = 0; i < p.piece_count; i++) s.keys += p.pieces[i].length;
  s.blocks = ceil_div(s.keys, BLOCK_KEYS);
  const int threads = busy_threads(p.threads, static_cast<double>(p.rows) * s.keys * p.size, HEAD_WORK);
  static thread_local Scratch key_scratch, value_scratch;
  bfloat16* keys = key_scratch.get<bfloat16>(s.blocks * s.key_block());
  bfloat16* values = value_scratch.get<bfloat16>(s.blocks * s.value_block());
  for (long pair = 0; pair < p.batch * p.heads; pair++) {
    const long batch = pair / p.heads, head = pair % p.heads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
      for (long block = 0; block < s.blocks; block++) {
        pack(p, s, batch, head, block, keys + block * s.key_block(), values + block * s.value_block());
      }
#pragma omp for schedule(dynamic)
      for (long begin = 0; begin < p.rows; begin += BLOCK_ROWS) query_block(p, s, batch, head, begin, keys, values);
    }
  }
}

}  // namespace

extern "C" int fxq_attention(const Attention* p) {
  with_threads(p->threads, [&] { run(*p); });
  return 0;
}
