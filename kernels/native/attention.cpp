// Flash attention with float32 sums for caches of any length in any number of pieces: products of bfloat16 with AMX or
// AVX512 BF16, of float32 with AVX2.
//
// Per batch and head the keys and values are packed once into the panels that the tile reads; blocks of queries then run
// over blocks of keys: scores, one pass for maximum and exp, and a second product that accumulates.
#include <cstring>
#include <limits>
#include <type_traits>

#include "calls.h"
#include "operands.h"
#include "unpack.h"

using namespace fxq;

namespace {

using Operands = FloatOperands;
using Number = Operands::Number;

constexpr long BLOCK_KEYS = 256;
constexpr double HEAD_WORK = 1 << 22;  // multiply-adds of one product a thread
constexpr float LOWEST = -3.0e38f;

struct Shape {
  long steps;    // along the head
  long columns;  // panels of 64 channels of the head
  long keys, blocks;

  long depth() const { return steps * Operands::EACH; }
  long key_block() const { return BLOCK_KEYS * depth(); }  // elements of a block of packed keys
  long value_block() const { return BLOCK_KEYS * columns * TILE_COLUMNS; }
};

// Steps of the second product over some keys of a block; what is behind the last key counts as 0.
long value_steps(long keys) { return round_up(ceil_div(keys, Operands::EACH), Operands::STEPS); }

// Channels of a value: of encoded ones coefficients, where these are read.
long value_size(const Attention& p) { return p.span == nullptr ? p.size : p.span->values.size; }

// A row as the numbers that are multiplied.
template <typename T>
void copy_row(const T* from, long size, Number* to) {
  if constexpr (std::is_same_v<T, Number>) {
    std::memcpy(to, from, size * sizeof(Number));
  } else {
    for (long d = 0; d < size; d += LANES) store(to + d, load(from + d, lanes(size - d)), lanes(size - d));
  }
}

// Keys or values of one head in the pieces where they lie; asked for in ascending order.
template <typename T, bool KEYS>
class Pieces {
 public:
  Pieces(const Attention& call, long batch, long head) : p_(call), batch_(batch), head_(head) {}

  void get(long key, Number* to) {
    while (key >= start_ + p_.pieces[piece_].length) start_ += p_.pieces[piece_++].length;
    const Piece& from = p_.pieces[piece_];
    key -= start_;
    const long place = KEYS ? batch_ * from.k_batch + key * from.k_row + head_ * from.k_head
                            : batch_ * from.v_batch + key * from.v_row + head_ * from.v_head;
    copy_row(static_cast<const T*>(KEYS ? from.k : from.v) + place, p_.size, to);
  }

 private:
  const Attention& p_;
  long batch_, head_, piece_ = 0, start_ = 0;
};

// Keys to BLOCK_KEYS / 64 panels of the head's steps. LANES keys are rows of words that are turned around, LANES steps at
// a time.
template <typename Source>
void pack_keys(Source source, const Shape& s, long block, Number* to) {
  static thread_local Scratch scratch;
  const long count = std::min(BLOCK_KEYS, s.keys - block * BLOCK_KEYS), row = round_up(s.steps, LANES) * Operands::EACH;
  Number* numbers = scratch.get<Number>(LANES * row);
  std::memset(numbers, 0, LANES * row * sizeof(Number));
  for (long key = 0; key < count; key += LANES) {
    for (long i = 0; i < std::min<long>(LANES, count - key); i++) {
      source.get(block * BLOCK_KEYS + key + i, numbers + i * row);
    }
    Number* panel = to + key / TILE_COLUMNS * s.depth() * TILE_COLUMNS;
    for (long k = 0; k < s.steps; k += LANES) {
      Ints words[LANES];
      for (int i = 0; i < LANES; i++) words[i] = load_ints(reinterpret_cast<const int32_t*>(numbers + i * row + k * Operands::EACH));
      turn(words);
      for (int i = 0; i < std::min<long>(LANES, s.steps - k); i++) {
        store(reinterpret_cast<int32_t*>(panel + Operands::place(s.steps, k + i, key % TILE_COLUMNS)), words[i]);
      }
    }
  }
}

// Values to [columns] panels of a step for every EACH keys; what is behind the last key is 0.
template <typename Source>
void pack_values(Source source, const Shape& s, long block, Number* to) {
  static thread_local Scratch scratch;
  constexpr int EACH = Operands::EACH;
  const long width = s.columns * TILE_COLUMNS, count = std::min(BLOCK_KEYS, s.keys - block * BLOCK_KEYS);
  const long steps = value_steps(count);
  Number* rows = scratch.get<Number>(EACH * width);
  std::memset(rows, 0, EACH * width * sizeof(Number));
  for (long k = 0; k < steps; k++) {
    for (int i = 0; i < EACH; i++) {
      if (EACH * k + i < count) {
        source.get(block * BLOCK_KEYS + EACH * k + i, rows + i * width);
      } else {
        std::memset(rows + i * width, 0, width * sizeof(Number));
      }
    }
    for (long d = 0; d < width; d += LANES) {
      Number* panel = to + d / TILE_COLUMNS * BLOCK_KEYS * TILE_COLUMNS;
      Operands::interleave(rows + d, width, panel + Operands::place(steps, k, d % TILE_COLUMNS));
    }
  }
}

struct Block {      // scratch of one block of queries; scores and weights are those of all of a group
  Number* q;        // [QUERY_ROWS, depth]
  float* scores;    // [QUERY_ROWS, BLOCK_KEYS]
  Number* weights;  // [QUERY_ROWS, BLOCK_KEYS]
  float* out;       // [QUERY_ROWS, 64 * columns]
  float* maximum;   // [QUERY_ROWS], of scores times the softmax scale
  float* total;     // [QUERY_ROWS]

  Block at(const Shape& s, long row) const {
    return {q + row * s.depth(), scores, weights, out + row * s.columns * TILE_COLUMNS, maximum + row, total + row};
  }
};

// Scores of one row to weights; rescales what the row has summed up so far.
void soften(const Block& b, long row, long keys, long width, float scale) {
  float* scores = b.scores + row * BLOCK_KEYS;
  for (long k = keys; k < round_up(keys, LANES); k++) scores[k] = LOWEST;
  Floats top = floats(LOWEST);
  for (long k = 0; k < keys; k += LANES) top = greatest(load(scores + k), top);  // of numbers
  const float before = b.maximum[row], now = std::max(before, highest(top) * scale);
  const Floats center = floats(-now), factor = floats(scale);
  Floats total = floats(0);
  Number* weights = b.weights + row * BLOCK_KEYS;
  for (long k = 0; k < keys; k += LANES) {
    const Floats weight = keep(Operands::exp(fmadd(load(scores + k), factor, center)), lanes(keys - k));
    total = total + weight;
    store(weights + k, weight);
  }
  for (long k = round_up(keys, LANES); k < Operands::EACH * value_steps(keys); k += LANES) store(weights + k, floats(0));
  if (now != before) {
    const Floats shrink = exp(floats(before - now));
    float factors[LANES];
    store(factors, shrink);
    b.total[row] *= factors[0];
    float* out = b.out + row * width;
    for (long d = 0; d < width; d += LANES) store(out + d, load(out + d) * shrink);
    b.maximum[row] = now;
  }
  b.total[row] += sum(total);
}

// Some queries and one block of keys.
void attend(const Attention& p, const Shape& s, const Block& b, long rows, long count, const Number* k, const Number* v) {
  const long width = s.columns * TILE_COLUMNS, depth = s.depth();
  for (long panel = 0; panel < ceil_div(count, TILE_COLUMNS); panel++) {
    for (long row = 0; row < rows; row += Operands::ROWS) {
      Operands::multiply(b.q + row * depth, depth, k + panel * depth * TILE_COLUMNS, s.steps,
                         b.scores + row * BLOCK_KEYS + panel * TILE_COLUMNS, BLOCK_KEYS);
    }
  }
  const float scale = 1.0f / std::sqrt(static_cast<float>(p.size));
  for (long row = 0; row < rows; row++) soften(b, row, count, width, scale);
  for (long panel = 0; panel < s.columns; panel++) {
    const Number* from = v + panel * BLOCK_KEYS * TILE_COLUMNS;
    for (long row = 0; row < rows; row += Operands::ROWS) {
      Operands::add_multiply(b.weights + row * BLOCK_KEYS, BLOCK_KEYS, from, value_steps(count),
                             b.out + row * width + panel * TILE_COLUMNS, width);
    }
  }
}

template <typename T>
void pack(const Attention& p, const Shape& s, long batch, long head, long block, Number* keys, Number* values) {
  if (p.span == nullptr) {
    pack_keys(Pieces<T, true>(p, batch, head), s, block, keys);
    pack_values(Pieces<T, false>(p, batch, head), s, block, values);
    return;
  }
  const Span& from = *p.span;
  const long end = std::min((block + 1) * BLOCK_KEYS, s.keys);
  pack_keys(Decoded<Number>(from.keys, from.cos, from.sin, batch, head, end), s, block, keys);
  pack_values(Decoded<Number>(from.values, nullptr, nullptr, batch, head, end), s, block, values);
}

// Queries that go over the keys together: what is packed of these stays in the second-level cache meanwhile.
template <typename T>
void query_group(const Attention& p, const Shape& s, long batch, long head, long begin, long most, const Number* keys,
                 const Number* values) {
  static thread_local Scratch q, scores, weights, out, maximum, total;
  const long width = s.columns * TILE_COLUMNS, rows = std::min(most, p.rows - begin), size = value_size(p);
  const Block b{q.get<Number>(most * s.depth()), scores.get<float>(QUERY_ROWS * BLOCK_KEYS),
                weights.get<Number>(QUERY_ROWS * BLOCK_KEYS), out.get<float>(most * width),
                maximum.get<float>(most), total.get<float>(most)};
  const long padded = round_up(rows, Operands::ROWS);
  const bool merges = p.span != nullptr && p.span->merges;
  std::memset(b.q, 0, padded * s.depth() * sizeof(Number));
  std::memset(b.out, 0, padded * width * sizeof(float));
  for (long i = 0; i < rows; i++) {
    copy_row(static_cast<const T*>(p.q) + batch * p.q_batch + (begin + i) * p.q_row + head * p.q_head, p.size, b.q + i * s.depth());
    const long place = (batch * p.rows + begin + i) * p.heads + head;
    if (merges) std::memcpy(b.out + i * width, p.part + place * size, size * sizeof(float));
    b.maximum[i] = merges ? p.lse[place] : LOWEST;
    b.total[i] = merges ? 1 : 0;
  }
  for (long block = 0; block < s.blocks; block++) {
    const long count = std::min(BLOCK_KEYS, s.keys - block * BLOCK_KEYS);
    for (long row = 0; row < rows; row += QUERY_ROWS) {
      attend(p, s, b.at(s, row), std::min(QUERY_ROWS, rows - row), count, keys + block * s.key_block(),
             values + block * s.value_block());
    }
  }
  for (long i = 0; i < rows; i++) {
    const long place = (batch * p.rows + begin + i) * p.heads + head;
    const Floats inverse = floats(1.0f / b.total[i]);
    for (long d = 0; d < size; d += LANES) {
      const Floats result = load(b.out + i * width + d) * inverse;
      if (p.out != nullptr) {
        store(static_cast<T*>(p.out) + place * size + d, result, lanes(size - d));
      } else {
        store(p.part + place * size + d, result, lanes(size - d));
      }
    }
    if (p.lse != nullptr) p.lse[place] = b.maximum[i] + std::log(b.total[i]);
  }
}

template <typename T>
void run(const Attention& p) {
  Shape s{round_up(ceil_div(p.size, Operands::EACH), Operands::STEPS), ceil_div(value_size(p), TILE_COLUMNS), 0, 0};
  for (long i = 0; i < p.piece_count; i++) s.keys += p.pieces[i].length;
  s.blocks = ceil_div(s.keys, BLOCK_KEYS);
  const int threads = busy_threads(p.threads, static_cast<double>(p.rows) * s.keys * p.size, HEAD_WORK);
  const long group = query_rows_of_a_group(p.rows, threads);
  static thread_local Scratch key_scratch, value_scratch;
  Number* keys = key_scratch.get<Number>(s.blocks * s.key_block());
  Number* values = value_scratch.get<Number>(s.blocks * s.value_block());
  for (long pair = 0; pair < p.batch * p.heads; pair++) {
    const long batch = pair / p.heads, head = pair % p.heads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      [[maybe_unused]] const Operands::Session session;
#pragma omp for schedule(static)
      for (long block = 0; block < s.blocks; block++) {
        pack<T>(p, s, batch, head, block, keys + block * s.key_block(), values + block * s.value_block());
      }
#pragma omp for schedule(dynamic)
      for (long begin = 0; begin < p.rows; begin += group) query_group<T>(p, s, batch, head, begin, group, keys, values);
    }
  }
}

}  // namespace

extern "C" int fxq_attention(const Attention* p) {
  with_threads(p->threads, [&] { p->is_bfloat16 ? run<bfloat16>(*p) : run<float>(*p); });
  return 0;
}
