// Attention whose products are of integers, as fxq/kernels/attention/eight_bits/int8.py defines it: codes of queries and
// keys with a scale for every token, weights of 0..32767 relative to the largest of a block of keys, codes of values with
// a scale for every channel of a block.
//
// Per batch and head each block of a piece is quantized once into the panels that the tile reads. Blocks of queries then
// run over them: scores, one pass for the maximum and one for the weights, and a product whose int32 sums are added to
// what the blocks before gave.
#include <cstring>
#include <limits>
#include <vector>

#include "calls.h"
#include "operands.h"

using namespace fxq;

namespace {

using Codes = CodeOperands;
using Weights = WeightOperands;

constexpr long BLOCK_KEYS = 256;      // VALUE_BLOCK of the definition
constexpr double HEAD_WORK = 1 << 23;  // multiply-adds of one product a thread
constexpr float NONE = -std::numeric_limits<float>::infinity();
constexpr float MOST_WEIGHT = 32767.0f, MOST_CODE = 127.0f;
constexpr float LEAST_MAGNITUDE = 0x1p-126f * 127;  // of fxq.numerics

constexpr long WEIGHT_ROW = Weights::PARTS * BLOCK_KEYS;

struct Shape {
  long steps;    // along the head
  long columns;  // panels of 64 channels of the head

  long depth() const { return steps * Codes::EACH; }
  long width() const { return columns * TILE_COLUMNS; }
};

// Steps of the second product over some keys of a block; behind the last key codes are 0, whatever the weights are.
long value_steps(long keys) { return round_up(ceil_div(keys, Weights::EACH), Weights::STEPS); }

// Up to BLOCK_KEYS tokens of a piece, and what they become.
struct Tokens {
  long piece, first, count;
  Codes::Number* keys;  // [count / 64] panels of the head's steps
  Weights::Number* values;  // [columns] panels of a step for every EACH keys
  float* key_scale;     // [BLOCK_KEYS]
  int32_t* key_offset;  // [BLOCK_KEYS], OFFSET times the sum of a key's codes
  float* value_scale;   // [width]
  float* taint;         // 0, or NaN where a key is not finite
};

// As fxq.numerics.token_scale, of the bits of the largest magnitude: those of NaN are above all others.
float scale_of(int32_t bits) {
  float top;
  std::memcpy(&top, &bits, sizeof(top));
  if (!std::isfinite(top)) return std::numeric_limits<float>::quiet_NaN();
  return top <= LEAST_MAGNITUDE ? 1.0f : top / MOST_CODE;
}

Ints codes_of(Floats x, Floats inverse) {  // of NaN anything: its scale is NaN
  return to_ints(least(greatest(x * inverse, floats(-MOST_CODE)), floats(MOST_CODE)));
}

int32_t largest(Ints bits) {
  int32_t each[LANES];
  std::memcpy(each, &bits, sizeof(each));
  return *std::max_element(each, each + LANES);
}

// A row less `mean` (or null) as codes in steps of the head, `put(step, codes)`; returns its scale, and the codes' sum.
template <typename T, typename Put>
float quantize_row(const T* from, const float* mean, long size, const Shape& s, int32_t* sum_of, Put put) {
  static thread_local Scratch float_scratch, code_scratch;
  const long padded = round_up(s.depth(), LANES);
  float* x = float_scratch.get<float>(padded);
  int32_t* codes = code_scratch.get<int32_t>(padded);
  Ints top = ints(0);
  for (long d = 0; d < padded; d += LANES) {
    const Lanes some = lanes(size - d);
    Floats v = load(from + d, some);
    if (mean != nullptr) v = v - load(mean + d, some);
    store(x + d, v);
    top = greatest(top, word_of(magnitude(v)));
  }
  const float scale = scale_of(largest(top));
  const Floats inverse = floats(1.0f / scale);
  Ints total = ints(0);
  for (long d = 0; d < padded; d += LANES) {
    const Ints code = codes_of(load(x + d), inverse);
    std::memcpy(codes + d, &code, sizeof(code));
    total = plus(total, code);
  }
  int32_t each[LANES];
  std::memcpy(each, &total, sizeof(each));
  *sum_of = 0;
  for (int i = 0; i < LANES; i++) *sum_of += each[i];
  for (long k = 0; k < s.steps; k++) put(k, codes + k * Codes::EACH);
  return scale;
}

template <typename T>
const T* at(const void* base, long batch, long row, long head, long s_batch, long s_row, long s_head) {
  return static_cast<const T*>(base) + batch * s_batch + row * s_row + head * s_head;
}

const float* mean_of(const Attention& p, long piece, long batch, long head) {
  return p.means + ((piece * p.batch + batch) * p.heads + head) * p.size;
}

template <typename T>
void pack_keys(const Attention& p, const Shape& s, long batch, long head, const Tokens& t) {
  const Piece& from = p.pieces[t.piece];
  const float* mean = mean_of(p, t.piece, batch, head);
  float taint = 0;
  for (long key = 0; key < t.count; key++) {
    Codes::Number* panel = t.keys + key / TILE_COLUMNS * s.depth() * TILE_COLUMNS;
    const auto put = [&](long k, const int32_t* codes) {
      Codes::Number* to = panel + Codes::place(s.steps, k, key % TILE_COLUMNS);
      for (int i = 0; i < Codes::EACH; i++) to[i] = static_cast<Codes::Number>(codes[i]);
    };
    const T* row = at<T>(from.k, batch, t.first + key, head, from.k_batch, from.k_row, from.k_head);
    t.key_scale[key] = quantize_row(row, mean, p.size, s, t.key_offset + key, put);
    t.key_offset[key] *= Codes::OFFSET;
    taint += 0 * t.key_scale[key];
  }
  *t.taint = taint;
}

template <typename T>
void pack_values(const Attention& p, const Shape& s, long batch, long head, const Tokens& t) {
  const Piece& from = p.pieces[t.piece];
  const auto row = [&](long key) { return at<T>(from.v, batch, t.first + key, head, from.v_batch, from.v_row, from.v_head); };
  constexpr int EACH = Weights::EACH;
  const long steps = value_steps(t.count);
  for (long d = 0; d < s.width(); d += LANES) {
    const Lanes some = lanes(p.size - d);
    Ints top = ints(0);
    for (long key = 0; key < t.count; key++) top = greatest(top, word_of(magnitude(load(row(key) + d, some))));
    int32_t bits[LANES];
    std::memcpy(bits, &top, sizeof(bits));
    for (int i = 0; i < LANES; i++) t.value_scale[d + i] = scale_of(bits[i]);
    const Floats inverse = floats(1.0f) / load(t.value_scale + d);
    Weights::Number* panel = t.values + d / TILE_COLUMNS * BLOCK_KEYS * TILE_COLUMNS;
    for (long k = 0; k < steps; k++) {
      Ints codes[EACH];
      for (int i = 0; i < EACH; i++) {
        const long key = EACH * k + i;
        codes[i] = key < t.count ? codes_of(load(row(key) + d, some), inverse) : ints(0);
      }
      Weights::interleave(codes, panel + Weights::place(steps, k, d % TILE_COLUMNS));
    }
  }
}

// What pack_keys and pack_values make, of codes that are there.
void copy_keys(const Attention& p, const Shape& s, long batch, long head, const Tokens& t) {
  const Piece& from = p.pieces[t.piece];
  float taint = 0;
  for (long key = 0; key < t.count; key++) {
    const long token = t.first + key;
    const int8_t* row = at<int8_t>(from.k, batch, token, head, from.k_batch, from.k_row, from.k_head);
    Codes::Number* panel = t.keys + key / TILE_COLUMNS * s.depth() * TILE_COLUMNS;
    int32_t sum_of = 0;
    for (long d = 0; d < p.size; d++) sum_of += row[d];
    for (long k = 0; k < s.steps; k++) {
      Codes::Number* to = panel + Codes::place(s.steps, k, key % TILE_COLUMNS);
      for (int i = 0; i < Codes::EACH; i++) {
        const long d = k * Codes::EACH + i;
        to[i] = static_cast<Codes::Number>(d < p.size ? row[d] : 0);
      }
    }
    t.key_offset[key] = sum_of * Codes::OFFSET;
    t.key_scale[key] = from.k_scale[batch * from.scale_batch + token * p.heads + head];
    taint += 0 * t.key_scale[key];
  }
  *t.taint = taint;
}

void copy_values(const Attention& p, const Shape& s, long batch, long head, const Tokens& t) {
  const Piece& from = p.pieces[t.piece];
  constexpr int EACH = Weights::EACH;
  const float* scale = from.v_scale + batch * from.block_batch + (t.first / BLOCK_KEYS * p.heads + head) * p.size;
  const long steps = value_steps(t.count);
  for (long d = 0; d < s.width(); d += LANES) {
    const long some = std::clamp<long>(p.size - d, 0, LANES);
    for (int i = 0; i < LANES; i++) t.value_scale[d + i] = i < some ? scale[d + i] : 1.0f;
    Weights::Number* panel = t.values + d / TILE_COLUMNS * BLOCK_KEYS * TILE_COLUMNS;
    for (long k = 0; k < steps; k++) {
      Ints codes[EACH];
      for (int i = 0; i < EACH; i++) {
        const long key = EACH * k + i;
        int32_t each[LANES] = {};
        if (key < t.count) {
          const int8_t* row = at<int8_t>(from.v, batch, t.first + key, head, from.v_batch, from.v_row, from.v_head) + d;
          for (long j = 0; j < some; j++) each[j] = row[j];
        }
        std::memcpy(codes + i, each, sizeof(each));
      }
      Weights::interleave(codes, panel + Weights::place(steps, k, d % TILE_COLUMNS));
    }
  }
}

template <typename T>
void pack(const Attention& p, const Shape& s, long batch, long head, const Tokens& t) {
  if (p.pieces[t.piece].k_scale != nullptr) {
    copy_keys(p, s, batch, head, t);
    copy_values(p, s, batch, head, t);
  } else {
    pack_keys<T>(p, s, batch, head, t);
    pack_values<T>(p, s, batch, head, t);
  }
}

struct Block {      // scratch of one block of queries; dots, weights, shrink and grow are those of all of a group
  Codes::Row* q;    // [QUERY_ROWS, depth]
  int32_t* dots;    // [QUERY_ROWS, BLOCK_KEYS]; scores in their place, float32
  Weights::Row* weights;  // [QUERY_ROWS, PARTS, BLOCK_KEYS]
  float* out;       // [QUERY_ROWS, width]
  float* factor;    // [QUERY_ROWS], the scale of a query times that of the softmax
  float* bias;      // [QUERY_ROWS], what a piece's mean adds to the scores
  float* maximum;   // [QUERY_ROWS]
  float* total;     // [QUERY_ROWS], of weights
  float* shrink;    // [QUERY_ROWS], of what the blocks before gave
  float* grow;      // [QUERY_ROWS], of what this one gives

  Block at(const Shape& s, long row) const {
    return {q + row * s.depth(), dots, weights, out + row * s.width(), factor + row, bias + row,
            maximum + row, total + row, shrink, grow};
  }
};

// Sums of one row to weights, relative to the largest score of the block.
void soften(const Block& b, long row, const Tokens& t) {
  int32_t* dots = b.dots + row * BLOCK_KEYS;
  float* scores = reinterpret_cast<float*>(dots);
  const Floats factor = floats(b.factor[row]);
  Floats top = floats(NONE);
  for (long k = 0; k < t.count; k += LANES) {
    Ints sums = load_ints(dots + k);
    if (Codes::OFFSET) sums = minus(sums, load_ints(t.key_offset + k));
    const Floats score = to_floats(sums) * (load(t.key_scale + k) * factor);
    const Floats found = choose(score, floats(NONE), lanes(t.count - k));
    store(scores + k, found);
    top = greatest(found, top);  // of numbers
  }
  const float highest_score = highest(top);
  const Floats center = floats(highest_score);
  Ints sum_of = ints(0);
  for (long k = 0; k < t.count; k += LANES) {
    const Ints weight = to_ints(exp(load(scores + k) - center) * floats(MOST_WEIGHT));
    sum_of = plus(sum_of, weight);
    Weights::put_weights(b.weights + row * WEIGHT_ROW + k, BLOCK_KEYS, weight);
  }
  const float found = highest_score + b.bias[row], before = b.maximum[row];
  const bool above = found > before;
  b.shrink[row] = above ? std::exp(before - found) : 1.0f;
  b.grow[row] = above ? 1.0f : std::exp(found - before);
  b.maximum[row] = above ? found : before;
  // What is not finite has no maximum: it shows in the sum.
  b.total[row] = b.total[row] * b.shrink[row] + sum(to_floats(sum_of)) * b.grow[row] + 0 * found + *t.taint;
}

// What a piece's mean adds to the scores of its keys.
template <typename T>
void add_mean(const Attention& p, const Block& b, long batch, long head, long begin, long rows, long piece) {
  const float* mean = mean_of(p, piece, batch, head);
  const float scale = 1.0f / std::sqrt(static_cast<float>(p.size));
  for (long i = 0; i < rows; i++) {
    const T* q = at<T>(p.q, batch, begin + i, head, p.q_batch, p.q_row, p.q_head);
    Floats dot = floats(0);
    for (long d = 0; d < p.size; d += LANES) {
      dot = fmadd(load(q + d, lanes(p.size - d)), load(mean + d, lanes(p.size - d)), dot);
    }
    b.bias[i] = sum(dot) * scale;
  }
}

// Some queries and one block of keys.
void attend(const Shape& s, const Block& b, long rows, const Tokens& t) {
  alignas(64) int32_t sums[Weights::ROWS * TILE_COLUMNS];
  for (long panel = 0; panel < ceil_div(t.count, TILE_COLUMNS); panel++) {
    for (long row = 0; row < rows; row += Codes::ROWS) {
      Codes::multiply(b.q + row * s.depth(), s.depth(), t.keys + panel * s.depth() * TILE_COLUMNS, s.steps,
                      b.dots + row * BLOCK_KEYS + panel * TILE_COLUMNS, BLOCK_KEYS);
    }
  }
  for (long row = 0; row < rows; row++) soften(b, row, t);
  for (long panel = 0; panel < s.columns; panel++) {
    const Weights::Number* from = t.values + panel * BLOCK_KEYS * TILE_COLUMNS;
    for (long row = 0; row < rows; row += Weights::ROWS) {
      Weights::multiply(b.weights + row * WEIGHT_ROW, WEIGHT_ROW, from, value_steps(t.count), sums, TILE_COLUMNS);
      for (long i = 0; i < std::min<long>(Weights::ROWS, rows - row); i++) {
        float* out = b.out + (row + i) * s.width() + panel * TILE_COLUMNS;
        const Floats shrink = floats(b.shrink[row + i]), grow = floats(b.grow[row + i]);
        for (long d = 0; d < TILE_COLUMNS; d += LANES) {
          const Floats scale = load(t.value_scale + panel * TILE_COLUMNS + d) * grow;
          store(out + d, fmadd(to_floats(load_ints(sums + i * TILE_COLUMNS + d)), scale, load(out + d) * shrink));
        }
      }
    }
  }
}

// Queries that go over the keys together, as in attention.cpp.
template <typename T>
void query_group(const Attention& p, const Shape& s, long batch, long head, long begin, long most,
                 const std::vector<Tokens>& blocks) {
  static thread_local Scratch q, dots, weights, out, numbers;
  const long rows = std::min(most, p.rows - begin), padded = round_up(rows, Codes::ROWS);
  float* each = numbers.get<float>(6 * most);
  const auto row_numbers = [&] { return (each += most) - most; };
  Block b{q.get<Codes::Row>(most * s.depth()), dots.get<int32_t>(QUERY_ROWS * BLOCK_KEYS),
          weights.get<Weights::Row>(QUERY_ROWS * WEIGHT_ROW), out.get<float>(most * s.width())};
  for (float** one : {&b.factor, &b.bias, &b.maximum, &b.total, &b.shrink, &b.grow}) *one = row_numbers();
  std::memset(b.q, 0, padded * s.depth() * sizeof(Codes::Row));
  std::memset(b.out, 0, padded * s.width() * sizeof(float));
  for (long i = 0; i < rows; i++) {
    Codes::Row* to = b.q + i * s.depth();
    const auto put = [&](long k, const int32_t* codes) {
      for (int j = 0; j < Codes::EACH; j++) to[k * Codes::EACH + j] = static_cast<Codes::Row>(codes[j] + Codes::OFFSET);
    };
    const T* row = at<T>(p.q, batch, begin + i, head, p.q_batch, p.q_row, p.q_head);
    int32_t unused;
    b.factor[i] = quantize_row(row, nullptr, p.size, s, &unused, put) / std::sqrt(static_cast<float>(p.size));
    b.maximum[i] = NONE;
    b.total[i] = 0 * b.factor[i];
  }
  long piece = -1;
  for (const Tokens& t : blocks) {
    if (t.piece != piece) add_mean<T>(p, b, batch, head, begin, rows, t.piece);
    piece = t.piece;
    for (long row = 0; row < rows; row += QUERY_ROWS) attend(s, b.at(s, row), std::min(QUERY_ROWS, rows - row), t);
  }
  for (long i = 0; i < rows; i++) {
    const Floats inverse = floats(b.total[i] == 0 ? 0.0f : 1.0f / b.total[i]);
    T* to = static_cast<T*>(p.out) + ((batch * p.rows + begin + i) * p.heads + head) * p.size;
    for (long d = 0; d < p.size; d += LANES) store(to + d, load(b.out + i * s.width() + d) * inverse, lanes(p.size - d));
  }
}

// The blocks of all pieces, with memory for one head.
std::vector<Tokens> blocks_of(const Attention& p, const Shape& s) {
  static thread_local Scratch key_scratch, value_scratch, number_scratch, offset_scratch;
  std::vector<Tokens> blocks;
  for (long piece = 0; piece < p.piece_count; piece++) {
    for (long first = p.pieces[piece].skip, next; first < p.pieces[piece].length; first = next) {
      next = std::min((first / BLOCK_KEYS + 1) * BLOCK_KEYS, p.pieces[piece].length);
      blocks.push_back({piece, first, next - first});
    }
  }
  const long count = blocks.size(), keys = BLOCK_KEYS * s.depth(), values = BLOCK_KEYS * s.width();
  const long numbers = BLOCK_KEYS + s.width() + 16;
  auto* key_memory = key_scratch.get<Codes::Number>(count * keys);
  auto* value_memory = value_scratch.get<Weights::Number>(count * values);
  auto* number_memory = number_scratch.get<float>(count * numbers);
  auto* offset_memory = offset_scratch.get<int32_t>(count * BLOCK_KEYS);
  for (long i = 0; i < count; i++) {
    Tokens& t = blocks[i];
    t.keys = key_memory + i * keys;
    t.values = value_memory + i * values;
    t.key_scale = number_memory + i * numbers;
    t.value_scale = t.key_scale + BLOCK_KEYS;
    t.taint = t.value_scale + s.width();
    t.key_offset = offset_memory + i * BLOCK_KEYS;
  }
  return blocks;
}

template <typename T>
void run(const Attention& p) {
  const Shape s{round_up(ceil_div(p.size, Codes::EACH), Codes::STEPS), ceil_div(p.size, TILE_COLUMNS)};
  const std::vector<Tokens> blocks = blocks_of(p, s);
  double keys = 0;
  for (const Tokens& t : blocks) keys += t.count;
  const int threads = busy_threads(p.threads, p.rows * keys * p.size, HEAD_WORK);
  const long group = query_rows_of_a_group(p.rows, threads);
  for (long pair = 0; pair < p.batch * p.heads; pair++) {
    const long batch = pair / p.heads, head = pair % p.heads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      [[maybe_unused]] const Codes::Session session;
#pragma omp for schedule(static)
      for (size_t i = 0; i < blocks.size(); i++) {
        pack<T>(p, s, batch, head, blocks[i]);
      }
#pragma omp for schedule(dynamic)
      for (long begin = 0; begin < p.rows; begin += group) query_group<T>(p, s, batch, head, begin, group, blocks);
    }
  }
}

}  // namespace

extern "C" int fxq_attention_int8(const Attention* p) {
  with_threads(p->threads, [&] { p->is_bfloat16 ? run<bfloat16>(*p) : run<float>(*p); });
  return 0;
}
