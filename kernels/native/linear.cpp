// Dual-scale integer product with its epilogues. Activations are read as q + 128 (unsigned, as VNNI wants its first
// operand); the panels carry 128 * sum_k q_w of each segment, which is subtracted before anything is scaled.
#include <vector>

#include "common.h"
#include "tile.h"

using namespace fxq;

namespace {

enum Store { FLOAT32, BFLOAT16, QUANTIZE, ADD_FLOAT32, ADD_BFLOAT16 };

constexpr long CHUNK_ROWS = 384;
constexpr double PRODUCT_WORK = 1 << 23;  // multiply-adds a thread

}  // namespace

extern "C" struct Linear {
  const int8_t* q;      // [rows, width], rows q_stride bytes apart
  const int8_t* panels;
  const float* weight_scale;  // [groups, outputs]
  const float* input_scale;   // [groups]; [rows, groups] per token; asymmetric [rows, 2 * groups], zero points behind the scales
  const float* offset;        // [outputs]
  void* out;                  // [rows, outputs]
  long rows, outputs, width, split, q_stride;
  int32_t store, threads;
  // QUANTIZE
  const float* out_scale;
  const int32_t* out_zero_point;
  long out_split;
  int32_t out_bits, activation;
  // ADD_*: residual [rows, outputs]; gate [rows / gate_rows, outputs], float32 or bfloat16, or null
  const void* residual;
  const void* gate;
  long residual_stride, gate_rows;
  int32_t gate_is_bfloat16;
  // FLOAT32 and BFLOAT16 only
  int32_t per_token, asymmetric;
};

namespace {

inline __m512 gelu(__m512 x) {
  // Abramowitz and Stegun 7.1.26: erf to 1.5e-7.
  const __m512 z = _mm512_mul_ps(x, _mm512_set1_ps(0.70710678f)), a = _mm512_abs_ps(z);
  const __m512 t = reciprocal(_mm512_fmadd_ps(a, _mm512_set1_ps(0.3275911f), _mm512_set1_ps(1.0f)));
  __m512 p = _mm512_set1_ps(1.061405429f);
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.453152027f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.284496736f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.254829592f));
  const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(p, t), exp(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(a, a))));
  // 1 + erf(z) is 2 - tail above zero and tail below it.
  const __mmask16 negative = _mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_LT_OQ);
  const __m512 one_plus_erf = _mm512_mask_mov_ps(_mm512_sub_ps(_mm512_set1_ps(2.0f), tail), negative, tail);
  return _mm512_mul_ps(_mm512_mul_ps(x, _mm512_set1_ps(0.5f)), one_plus_erf);
}

inline __m512 gelu_tanh(__m512 x) {
  // x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)) is the tanh form.
  const __m512 square = _mm512_mul_ps(x, x);
  const __m512 u = _mm512_mul_ps(x, _mm512_fmadd_ps(square, _mm512_set1_ps(0.0713548162726f), _mm512_set1_ps(1.5957691216057f)));
  const __m512 e = exp(_mm512_sub_ps(_mm512_setzero_ps(), u));
  return _mm512_mul_ps(x, reciprocal(_mm512_add_ps(_mm512_set1_ps(1.0f), e)));
}

// The activations, one function each of the name that fxq/kernels/gemm/activations.py gives it.
#define ACTIVATIONS(EACH) EACH(gelu) EACH(gelu_tanh)

#define CODE(name) name##_code,
enum Activation { none_code, ACTIVATIONS(CODE) ACTIVATION_COUNT };
#undef CODE

inline __m512 activate(int32_t activation, __m512 y) {
#define APPLY(name) \
  if (activation == name##_code) y = name(y);
  ACTIVATIONS(APPLY)
#undef APPLY
  return y;
}

struct Tile {
  long row, column;
  int rows;
  const int32_t* normal;   // [6, 64]
  const int32_t* outlier;  // [6, 64] or null
  const int32_t* sums;     // [2, 64], behind the panel's rows
};

template <typename T>
inline __m512 gate_at(const Linear& p, long row, long column, __mmask16 mask) {
  return load(static_cast<const T*>(p.gate) + row / p.gate_rows * p.outputs + column, mask);
}

template <typename T>
inline __m512 add_residual(const Linear& p, __m512 y, long row, long column, __mmask16 mask) {
  if (p.gate != nullptr) {
    const __m512 gate = p.gate_is_bfloat16 ? gate_at<bfloat16>(p, row, column, mask) : gate_at<float>(p, row, column, mask);
    y = _mm512_mul_ps(y, gate);
  }
  return _mm512_add_ps(load(static_cast<const T*>(p.residual) + row * p.residual_stride + column, mask), y);
}

// Integers of columns that may straddle the border between the consumer's groups. `broken` gets the lanes of what is
// not finite.
inline __m128i requantize(const Linear& p, const Group& first, const Group& second, __m512 y, long column, __mmask16& broken) {
  y = activate(p.activation, y);
  broken |= _mm512_fpclass_ps_mask(y, 0x99);  // NaN of both kinds, infinity of both signs
  if (column + 16 <= p.out_split) return first.quantize(y);
  if (column >= p.out_split) return second.quantize(y);
  return _mm_mask_mov_epi8(second.quantize(y), lanes(p.out_split - column), first.quantize(y));
}

// Rows that are not finite. Several threads may mark one.
struct Marks {
  std::vector<uint8_t> rows;

  void set(long row) { __atomic_store_n(&rows[row], 1, __ATOMIC_RELAXED); }
};

// What the scales of rows are: one of all, one of each, or one of each with a zero point.
enum Scales { STATIC, SYMMETRIC, ASYMMETRIC };

// A sum of a row without its zero point's share; the panel's sum is 128 times that of the weight.
inline __m512i without_zero(__m512i total, float zero, __m512i sum) {
  return _mm512_sub_epi32(total, _mm512_mullo_epi32(_mm512_set1_epi32(static_cast<int32_t>(zero)), _mm512_srai_epi32(sum, 7)));
}

template <int STORE, Scales SCALES>
void finish(const Linear& p, const Group& first, const Group& second, const Tile& tile, Marks& marks) {
  for (int j = 0; j < TILE_COLUMNS / 16; j++) {
    const long column = tile.column + 16 * j;
    if (column >= p.outputs) return;
    const __mmask16 mask = lanes(p.outputs - column);
    const __m512 offset = load(p.offset + column, mask);
    __m512 scale0 = load(p.weight_scale + column, mask);
    if (SCALES == STATIC) scale0 = _mm512_mul_ps(_mm512_set1_ps(p.input_scale[0]), scale0);
    const __m512i sum0 = _mm512_loadu_si512(tile.sums + 16 * j);
    __m512 scale1 = _mm512_setzero_ps();
    __m512i sum1 = _mm512_setzero_si512();
    if (tile.outlier != nullptr) {
      scale1 = load(p.weight_scale + p.outputs + column, mask);
      if (SCALES == STATIC) scale1 = _mm512_mul_ps(_mm512_set1_ps(p.input_scale[1]), scale1);
      sum1 = _mm512_loadu_si512(tile.sums + TILE_COLUMNS + 16 * j);
    }
    for (int i = 0; i < tile.rows; i++) {
      const long row = tile.row + i, place = row * p.outputs + column;
      __m512i total0 = _mm512_sub_epi32(_mm512_loadu_si512(tile.normal + i * TILE_COLUMNS + 16 * j), sum0);
      const int groups = tile.outlier != nullptr ? 2 : 1;
      const float* token = p.input_scale + row * (SCALES == ASYMMETRIC ? 2 * groups : groups);
      if (SCALES == ASYMMETRIC) total0 = without_zero(total0, token[groups], sum0);
      __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(total0), scale0);
      if (SCALES != STATIC) y = _mm512_mul_ps(y, _mm512_set1_ps(token[0]));
      y = _mm512_add_ps(y, offset);
      if (tile.outlier != nullptr) {
        __m512i total1 = _mm512_sub_epi32(_mm512_loadu_si512(tile.outlier + i * TILE_COLUMNS + 16 * j), sum1);
        if (SCALES == ASYMMETRIC) total1 = without_zero(total1, token[3], sum1);
        __m512 rest = _mm512_mul_ps(_mm512_cvtepi32_ps(total1), scale1);
        if (SCALES != STATIC) rest = _mm512_mul_ps(rest, _mm512_set1_ps(token[1]));
        y = _mm512_add_ps(rest, y);
      }
      if (STORE == FLOAT32) store(static_cast<float*>(p.out) + place, y, mask);
      if (STORE == BFLOAT16) store(static_cast<bfloat16*>(p.out) + place, y, mask);
      if (STORE == QUANTIZE) {
        __mmask16 broken = 0;
        store(static_cast<int8_t*>(p.out) + place, requantize(p, first, second, y, column, broken), mask);
        if (broken & mask) marks.set(row);
      }
      if (STORE == ADD_FLOAT32) store(static_cast<float*>(p.out) + place, add_residual<float>(p, y, row, column, mask), mask);
      if (STORE == ADD_BFLOAT16) store(static_cast<bfloat16*>(p.out) + place, add_residual<bfloat16>(p, y, row, column, mask), mask);
    }
  }
}

// Rows as unsigned bytes, each segment padded to whole steps of four channels.
void shift_to_unsigned(const Linear& p, long first, long last, long normal_bytes, uint8_t* to, long stride) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  const auto copy = [&](const int8_t* from, uint8_t* target, long bytes) {
    long k = 0;
    for (; k + 64 <= bytes; k += 64) _mm512_storeu_si512(target + k, _mm512_xor_si512(_mm512_loadu_si512(from + k), flip));
    if (k == bytes) return;
    const __mmask64 mask = (1ull << (bytes - k)) - 1;
    _mm512_mask_storeu_epi8(target + k, mask, _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, from + k), flip));
  };
  for (long row = first; row < last; row++, to += stride) {
    const int8_t* from = p.q + row * p.q_stride;
    copy(from, to, p.split);
    copy(from + p.split, to + normal_bytes, p.width - p.split);
  }
}

// The columns from `column` to `last` of a row whose integers were marked: NaN, or what NaN is quantized to.
template <int STORE>
void spoil(const Linear& p, long row, long column, long last, Marks& marks) {
  const long place = row * p.outputs;
  if (STORE == QUANTIZE) {
    std::memset(static_cast<int8_t*>(p.out) + place + column, -(1 << (p.out_bits - 1)), last - column);
    return marks.set(row);
  }
  const __m512 nan = _mm512_set1_ps(NAN);
  for (; column < last; column += 16) {
    const __mmask16 mask = lanes(last - column);
    if (STORE == FLOAT32 || STORE == ADD_FLOAT32) {
      store(static_cast<float*>(p.out) + place + column, nan, mask);
    } else {
      store(static_cast<bfloat16*>(p.out) + place + column, nan, mask);
    }
  }
}

template <int STORE, Scales SCALES = STATIC>
void run(const Linear& p) {
  const long threads = busy_threads(p.threads, static_cast<double>(p.rows) * p.outputs * p.width, PRODUCT_WORK);
  const long normal = ceil_div(p.split, 4), outlier = ceil_div(p.width - p.split, 4), steps = normal + outlier;
  const long panels = ceil_div(p.outputs, TILE_COLUMNS), panel_bytes = (steps + 2) * 256;
  // A row stride that is no multiple of 4096 keeps the six rows of a tile out of one cache set.
  long stride = round_up(4 * steps, 64) + 64;
  if (stride % 4096 == 0) stride += 64;
  long chunks = ceil_div(p.rows, CHUNK_ROWS);
  if (chunks < threads) chunks = std::min(threads, ceil_div(p.rows, 4 * TILE_ROWS));
  chunks = chunks > 1 ? std::min(round_up(chunks, threads), ceil_div(p.rows, TILE_ROWS)) : chunks;
  const long chunk = round_up(ceil_div(p.rows, chunks), TILE_ROWS);
  const long slices = std::min(panels, std::max(1L, threads / std::max(1L, chunks)));
  const long slice = ceil_div(panels, slices);
  const Group first(p.out_scale ? p.out_scale[0] : 1.0f, p.out_zero_point ? p.out_zero_point[0] : 0, p.out_bits);
  const bool two = p.out_split < p.outputs;
  const Group second(two ? p.out_scale[1] : 1.0f, two ? p.out_zero_point[1] : 0, p.out_bits);
  Marks marks;
  if (STORE == QUANTIZE) marks.rows.assign(p.rows, first.broken || second.broken);

#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (long task = 0; task < chunks * slices; task++) {
    static thread_local Scratch scratch;
    alignas(64) int32_t sum_normal[TILE_ROWS * TILE_COLUMNS], sum_outlier[TILE_ROWS * TILE_COLUMNS];
    const long begin = task / slices * chunk, end = std::min(p.rows, begin + chunk);
    if (begin >= end) continue;
    uint8_t* rows = scratch.get<uint8_t>((chunk + TILE_ROWS) * stride);
    shift_to_unsigned(p, begin, end, 4 * normal, rows, stride);
    const long from = task % slices * slice, to = std::min(panels, from + slice);
    for (long panel = from; panel < to; panel++) {
      const int8_t* weights = p.panels + panel * panel_bytes;
      const auto* sums = reinterpret_cast<const int32_t*>(weights + steps * 256);
      for (long row = begin; row < end; row += TILE_ROWS) {
        const uint8_t* a = rows + (row - begin) * stride;
        multiply_int8(a, stride, weights, normal, sum_normal, 256);
        if (outlier) multiply_int8(a + 4 * normal, stride, weights + normal * 256, outlier, sum_outlier, 256);
        const int height = static_cast<int>(std::min<long>(TILE_ROWS, end - row));
        finish<STORE, SCALES>(p, first, second, {row, panel * TILE_COLUMNS, height, sum_normal, outlier ? sum_outlier : nullptr, sums}, marks);
      }
    }
    for (long row = begin; row < end && SCALES == STATIC; row++) {
      if (!poisoned(p.q + row * p.q_stride, p.width)) continue;
      spoil<STORE>(p, row, from * TILE_COLUMNS, std::min(p.outputs, to * TILE_COLUMNS), marks);
    }
  }
  for (long row = 0; row < static_cast<long>(marks.rows.size()); row++) {
    if (marks.rows[row]) poison(static_cast<int8_t*>(p.out) + row * p.outputs, p.outputs);
  }
}

template <int STORE>
void run_rows(const Linear& p) {
  if (!p.per_token) return run<STORE>(p);
  return p.asymmetric ? run<STORE, ASYMMETRIC>(p) : run<STORE, SYMMETRIC>(p);
}

void choose(const Linear& p) {
  switch (p.store) {
    case FLOAT32: return run_rows<FLOAT32>(p);
    case BFLOAT16: return run_rows<BFLOAT16>(p);
    case QUANTIZE: return run<QUANTIZE>(p);
    case ADD_FLOAT32: return run<ADD_FLOAT32>(p);
    default: return run<ADD_BFLOAT16>(p);
  }
}

}  // namespace

extern "C" int fxq_linear(const Linear* p) {
  if (p->rows > 0 && p->outputs > 0) with_threads(p->threads, [&] { choose(*p); });
  return 0;
}

// What Linear::activation holds for a name, or -1 where there is no such function here.
extern "C" int fxq_activation(const char* name) {
#define NAME(name) , #name
  const char* const names[] = {"none" ACTIVATIONS(NAME)};
#undef NAME
  for (int code = 0; code < ACTIVATION_COUNT; code++) {
    if (std::strcmp(names[code], name) == 0) return code;
  }
  return -1;
}

extern "C" int fxq_after_fork() {
  forked = true;
  return 0;
}
