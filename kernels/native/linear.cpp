// Dual-scale integer product with its epilogues. On x86 activations are read as q + 128 (unsigned, as the instructions want
// their first operand); the panels carry 128 * sum_k q_w of each segment, which is subtracted before anything is scaled.
#include <vector>

#include "activations.h"
#include "calls.h"
#include "packed_panels.h"
#include "product.h"
#include "vectors.h"

using namespace fxq;

namespace {

enum Store { FLOAT32, BFLOAT16, QUANTIZE, ADD_FLOAT32, ADD_BFLOAT16 };

struct Tile {
  long row, column;
  int rows;
  const int32_t* normal;   // [rows, 64]
  const int32_t* outlier;  // [rows, 64] or null
  const int32_t* sums;     // [2, 64], behind the panel's rows
};

template <typename T>
inline Floats gate_at(const Linear& p, long row, long column, Lanes mask) {
  return load(static_cast<const T*>(p.gate) + row / p.gate_rows * p.outputs + column, mask);
}

template <typename T>
inline Floats add_residual(const Linear& p, Floats y, long row, long column, Lanes mask) {
  if (p.gate != nullptr) {
    y = y * (p.gate_is_bfloat16 ? gate_at<bfloat16>(p, row, column, mask) : gate_at<float>(p, row, column, mask));
  }
  return load(static_cast<const T*>(p.residual) + row * p.residual_stride + column, mask) + y;
}

// Integers of columns that may straddle the border between the consumer's groups. `broken` gets the lanes of what is
// not finite.
inline Bytes requantize(const Linear& p, const Group& first, const Group& second, Floats y, long column, uint32_t& broken) {
  y = activate(p.activation, y);
  broken |= not_finite(y);
  if (column + LANES <= p.out_split) return first.quantize(y);
  if (column >= p.out_split) return second.quantize(y);
  return choose(first.quantize(y), second.quantize(y), lanes(p.out_split - column));
}

// Rows that are not finite. Several threads may mark one.
struct Marks {
  std::vector<uint8_t> rows;

  void set(long row) { __atomic_store_n(&rows[row], 1, __ATOMIC_RELAXED); }
};

// What the scales of rows are: one of all, one of each, or one of each with a zero point.
enum Scales { STATIC, SYMMETRIC, ASYMMETRIC };

// A sum of q * w; the panel's sum is 128 times that of the weight.
inline Ints without_offset(Ints total, Ints sum) { return Product::OFFSET ? minus(total, sum) : total; }

// A sum of a row without its zero point's share.
inline Ints without_zero(Ints total, float zero, Ints sum) {
  return minus(total, times(ints(static_cast<int32_t>(zero)), shift_down<7>(sum)));
}

template <int STORE, Scales SCALES>
void finish(const Linear& p, const Group& first, const Group& second, const Tile& tile, Marks& marks) {
  for (int j = 0; j < TILE_COLUMNS; j += LANES) {
    const long column = tile.column + j;
    if (column >= p.outputs) return;
    const Lanes mask = lanes(p.outputs - column);
    const Floats offset = load(p.offset + column, mask);
    Floats scale0 = load(p.weight_scale + column, mask);
    if (SCALES == STATIC) scale0 = floats(p.input_scale[0]) * scale0;
    const Ints sum0 = load_ints(tile.sums + j);
    Floats scale1 = floats(0);
    Ints sum1 = ints(0);
    if (tile.outlier != nullptr) {
      scale1 = load(p.weight_scale + p.outputs + column, mask);
      if (SCALES == STATIC) scale1 = floats(p.input_scale[1]) * scale1;
      sum1 = load_ints(tile.sums + TILE_COLUMNS + j);
    }
    for (int i = 0; i < tile.rows; i++) {
      const long row = tile.row + i, place = row * p.outputs + column;
      Ints total0 = without_offset(load_ints(tile.normal + i * TILE_COLUMNS + j), sum0);
      const int groups = tile.outlier != nullptr ? 2 : 1;
      const float* token = p.input_scale + row * (SCALES == ASYMMETRIC ? 2 * groups : groups);
      if (SCALES == ASYMMETRIC) total0 = without_zero(total0, token[groups], sum0);
      Floats y = to_floats(total0) * scale0;
      if (SCALES != STATIC) y = y * floats(token[0]);
      y = y + offset;
      if (tile.outlier != nullptr) {
        Ints total1 = without_offset(load_ints(tile.outlier + i * TILE_COLUMNS + j), sum1);
        if (SCALES == ASYMMETRIC) total1 = without_zero(total1, token[3], sum1);
        Floats rest = to_floats(total1) * scale1;
        if (SCALES != STATIC) rest = rest * floats(token[1]);
        y = rest + y;
      }
      if (STORE == FLOAT32) store(static_cast<float*>(p.out) + place, y, mask);
      if (STORE == BFLOAT16) store(static_cast<bfloat16*>(p.out) + place, y, mask);
      if (STORE == QUANTIZE) {
        uint32_t broken = 0;
        store(static_cast<int8_t*>(p.out) + place, requantize(p, first, second, y, column, broken), mask);
        if (broken & bits(mask)) marks.set(row);
      }
      if (STORE == ADD_FLOAT32) store(static_cast<float*>(p.out) + place, add_residual<float>(p, y, row, column, mask), mask);
      if (STORE == ADD_BFLOAT16) store(static_cast<bfloat16*>(p.out) + place, add_residual<bfloat16>(p, y, row, column, mask), mask);
    }
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
  const Floats nan = floats(NAN);
  for (; column < last; column += LANES) {
    const Lanes mask = lanes(last - column);
    if (STORE == FLOAT32 || STORE == ADD_FLOAT32) {
      store(static_cast<float*>(p.out) + place + column, nan, mask);
    } else {
      store(static_cast<bfloat16*>(p.out) + place + column, nan, mask);
    }
  }
}

template <int STORE, Scales SCALES = STATIC>
void run(const Linear& p) {
  const long threads = busy_threads(p.threads, static_cast<double>(p.rows) * p.outputs * p.width, Product::LEAST_WORK);
  const Segments s(p);
  constexpr long row_bytes = 4 * TILE_COLUMNS;
  const long panels = ceil_div(p.outputs, TILE_COLUMNS), most = Product::most_rows(s);
  long chunks = ceil_div(p.rows, most);
  if (chunks < threads) chunks = std::min(threads, ceil_div(p.rows, 4 * Product::ROWS));
  chunks = chunks > 1 ? std::min(round_up(chunks, threads), ceil_div(p.rows, Product::ROWS)) : chunks;
  const long chunk = round_up(ceil_div(p.rows, chunks), Product::ROWS);
  const long slices = std::min(panels, std::max(1L, threads / std::max(1L, chunks)));
  const long slice = ceil_div(panels, slices);
  const Group first(p.out_scale ? p.out_scale[0] : 1.0f, p.out_zero_point ? p.out_zero_point[0] : 0, p.out_bits);
  const bool two = p.out_split < p.outputs;
  const Group second(two ? p.out_scale[1] : 1.0f, two ? p.out_zero_point[1] : 0, p.out_bits);
  Marks marks;
  if (STORE == QUANTIZE) marks.rows.assign(p.rows, first.broken || second.broken);

#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (long task = 0; task < chunks * slices; task++) {
    const long begin = task / slices * chunk, end = std::min(p.rows, begin + chunk);
    if (begin >= end) continue;
    Product product(p, s, begin, end);
    static thread_local Scratch scratch;
    // The rows behind the steps are read, whatever they hold.
    const bool widens = p.packed && !Product::READS_PACKED;
    int8_t* widened = widens ? scratch.get<int8_t>((s.steps() + 2) * row_bytes) : nullptr;
    const long from = task % slices * slice, to = std::min(panels, from + slice);
    for (long panel = from; panel < to; panel++) {
      const auto* weights = static_cast<const int8_t*>(p.panels) + panel * (s.panel_rows() + 2) * row_bytes;
      const auto* sums = reinterpret_cast<const int32_t*>(weights + s.panel_rows() * row_bytes);
      if (widens) widen(reinterpret_cast<const uint8_t*>(weights), s.panel_rows(), widened);
      product.multiply(widens ? widened : weights, [&](long row, int height, const int32_t* normal, const int32_t* outlier) {
        finish<STORE, SCALES>(p, first, second, {row, panel * TILE_COLUMNS, height, normal, outlier, sums}, marks);
      });
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
    case ADD_FLOAT32: return run_rows<ADD_FLOAT32>(p);
    default: return run_rows<ADD_BFLOAT16>(p);
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
