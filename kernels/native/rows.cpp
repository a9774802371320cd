// Row-wise kernels: quantization with static scales or one per token, after LayerNorm + modulation or alone, RMSNorm + rotary embedding.
#include "activations.h"
#include "calls.h"
#include "quantizer.h"
#include "vectors.h"

using namespace fxq;

namespace {

constexpr double ROWS_WORK = 1 << 16;  // elements a thread

enum Outcome { DONE, OUTSIDE };  // OUTSIDE: the permutation points outside of a row

template <typename T>
inline void widen(const T* from, float* to, long width) {
  for (long k = 0; k < width; k += LANES) store(to + k, load(from + k, lanes(width - k)));
}

// Sum of f(k, lanes) over a row. SUMS of them run side by side.
template <typename F>
inline float sum_of(long width, F f) {
  Floats totals[SUMS];
  for (Floats& total : totals) total = floats(0);
  long k = 0;
  for (; k + SUMS * LANES <= width; k += SUMS * LANES) {
    for (int i = 0; i < SUMS; i++) totals[i] = f(totals[i], k + i * LANES, ALL);
  }
  for (; k < width; k += LANES) totals[0] = f(totals[0], k, lanes(width - k));
  for (int i = 1; i < SUMS; i++) totals[0] = totals[0] + totals[i];
  return sum(totals[0]);
}

inline float sum(const float* row, long width) {
  return sum_of(width, [&](Floats total, long k, Lanes mask) { return total + load(row + k, mask); });
}

// 1 / sqrt(x), NaN where squares of finite numbers have overflown.
inline float inverse_root(float x) { return std::isfinite(x) ? 1.0f / std::sqrt(x) : NAN; }

// Sum of (x - mean)^2.
inline float squares(const float* row, long width, float mean) {
  return sum_of(width, [&](Floats total, long k, Lanes mask) {
    const Floats d = keep(load(row + k, mask) - floats(mean), mask);
    return fmadd(d, d, total);
  });
}

template <typename T>
void layer_norm_row(const Norm& p, long index, long width, float* row) {
  const float mean = sum(row, width) / width;
  const float inverse = inverse_root(squares(row, width, mean) / width + p.eps);
  const long frame = p.gain == nullptr ? 0 : index / p.gain_rows * width;
  for (long k = 0; k < width; k += LANES) {
    const Lanes mask = lanes(width - k);
    Floats v = (load(row + k, mask) - floats(mean)) * floats(inverse);
    if (p.weight != nullptr) v = v * load(p.weight + k, mask);
    if (p.bias != nullptr) v = v + load(p.bias + k, mask);
    if (p.gain != nullptr) {
      const Floats gain = load(static_cast<const T*>(p.gain) + frame + k, mask) + floats(1.0f);
      v = v * gain + load(static_cast<const T*>(p.shift) + frame + k, mask);
    }
    store(row + k, v, mask);
  }
}

// A row in float32 after its norm, in memory of this thread.
template <typename T>
const float* normed(const Rows& r, const Norm& norm, long index) {
  static thread_local Scratch scratch;
  float* row = scratch.get<float>(r.width + 16);
  widen(static_cast<const T*>(r.x) + index * r.x_stride, row, r.width);
  layer_norm_row<T>(norm, index, r.width, row);
  return row;
}

// A row in float32 after its activation, in memory of this thread.
template <typename T>
const float* activated(const Rows& r, int32_t activation, long index) {
  static thread_local Scratch scratch;
  float* row = scratch.get<float>(r.width + 16);
  const T* from = static_cast<const T*>(r.x) + index * r.x_stride;
  for (long k = 0; k < r.width; k += LANES) store(row + k, activate(activation, load(from + k, lanes(r.width - k))));
  return row;
}

template <typename T>
int quantize_rows(const Rows& r, const Norm* norm, const Quantization& q) {
  const Quantizer quantizer(q);
  if (!quantizer.inside()) return OUTSIDE;
  const int second = q.split < q.width ? 1 : 0;
  const Group normal(q.scale[0], q.zero_point[0], q.bits), outlier(q.scale[second], q.zero_point[second], q.bits);
  const int threads = busy_threads(r.threads, static_cast<double>(r.rows) * r.width, ROWS_WORK);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (long i = 0; i < r.rows; i++) {
    int8_t* to = static_cast<int8_t*>(r.out) + i * r.width;
    if (norm == nullptr) {
      quantizer.run_static(normal, outlier, static_cast<const T*>(r.x) + i * r.x_stride, to);
    } else {
      quantizer.run_static(normal, outlier, normed<T>(r, *norm, i), to);
    }
  }
  return DONE;
}

// Integers of a token; all 0 where it is not finite.
inline Group of_token(float scale, float high) { return std::isnan(scale) ? Group(INFINITY, 0.0f) : Group(scale, high); }

// The same of a token with a zero point, and both, as fxq.numerics.token_range.
inline Group of_range(float top, float least, const Tokens& tokens, int bits, float* scale, float* zero) {
  const float low = -static_cast<float>(1 << (bits - 1)), high = -low - 1.0f;
  const float half = top * 0.5f - least * 0.5f;
  *scale = !std::isfinite(half) ? NAN : half > tokens.least ? half / ((high - low) / 2.0f) : 1.0f;
  *zero = std::isfinite(half) && half > tokens.least ? low - std::nearbyint(least * (1.0f / *scale)) : 0.0f;
  return std::isnan(*scale) ? Group(INFINITY, 0.0f) : Group(1.0f / *scale, *zero, low, high);
}

// Integers of a row, and what it was measured by.
template <typename T>
void quantize_token(const Quantizer& quantizer, const Quantization& q, const Tokens& tokens, const T* from, long index, int8_t* to) {
  const long groups = q.split < q.width ? 2 : 1;
  Watch unread;
  if (tokens.asymmetric) {
    float top[2], least[2], measured[4];
    quantizer.range(from, top, least);
    const Group normal = of_range(top[0], least[0], tokens, q.bits, measured, measured + groups);
    float* rest = groups == 2 ? measured + 1 : measured + 2;  // of the group that there is not
    const Group outlier = of_range(top[1], least[1], tokens, q.bits, rest, rest + groups);
    std::copy(measured, measured + 2 * groups, tokens.scale + 2 * groups * index);
    return quantizer.run(normal, outlier, from, to, unread);
  }
  const float high = static_cast<float>((1 << (q.bits - 1)) - 1);
  float scale[2];
  quantizer.largest(from, scale);
  for (float& s : scale) s = !std::isfinite(s) ? NAN : s > tokens.least ? s / high : 1.0f;
  std::copy(scale, scale + groups, tokens.scale + index * groups);
  quantizer.run(of_token(scale[0], high), of_token(scale[1], high), from, to, unread);
}

template <typename T>
int quantize_tokens(const Rows& r, const Norm* norm, const Quantization& q, const Tokens& tokens) {
  const Quantizer quantizer(q);
  if (!quantizer.inside()) return OUTSIDE;
  const int threads = busy_threads(r.threads, static_cast<double>(r.rows) * r.width, ROWS_WORK);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (long i = 0; i < r.rows; i++) {
    int8_t* to = static_cast<int8_t*>(r.out) + i * r.width;
    if (tokens.activation != none_code) {
      quantize_token(quantizer, q, tokens, activated<T>(r, tokens.activation, i), i, to);
    } else if (norm == nullptr) {
      quantize_token(quantizer, q, tokens, static_cast<const T*>(r.x) + i * r.x_stride, i, to);
    } else {
      quantize_token(quantizer, q, tokens, normed<T>(r, *norm, i), i, to);
    }
  }
  return DONE;
}

template <typename T>
void rotate_head(const float* row, const float* cos, const float* sin, long size, T* out) {
  for (long k = 0; k < size; k += LANES) {
    const Lanes mask = lanes(size - k);
    const Floats c = load_twice(cos + k / 2, size - k), s = load_twice(sin + k / 2, size - k);
    store(out + k, rotate(load(row + k, mask), c, s), mask);
  }
}

template <typename T>
void rotate_rows(const Rows& r, const Rotary& p) {
  const int threads = busy_threads(r.threads, static_cast<double>(r.rows) * r.width, ROWS_WORK);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (long i = 0; i < r.rows; i++) {
    static thread_local Scratch scratch;
    float* row = scratch.get<float>(r.width + 16);
    widen(static_cast<const T*>(r.x) + i * r.x_stride, row, r.width);
    if (p.weight != nullptr) {
      const float inverse = inverse_root(squares(row, r.width, 0.0f) / r.width + p.eps);
      for (long k = 0; k < r.width; k += LANES) {
        const Lanes mask = lanes(r.width - k);
        store(row + k, load(row + k, mask) * floats(inverse) * load(p.weight + k, mask), mask);
      }
    }
    T* out = static_cast<T*>(r.out) + i * r.width;
    if (p.cos == nullptr) {
      for (long k = 0; k < r.width; k += LANES) store(out + k, load(row + k), lanes(r.width - k));
      continue;
    }
    const long place = i % p.sequence * (p.size / 2);
    for (long head = 0; head < p.heads; head++) {
      rotate_head(row + head * p.size, p.cos + place, p.sin + place, p.size, out + head * p.size);
    }
  }
}

}  // namespace

extern "C" int fxq_quantize_rows(const Rows* rows, const Norm* norm, const Quantization* quantization) {
  int outcome = DONE;
  with_threads(rows->threads, [&] {
    outcome = rows->is_bfloat16 ? quantize_rows<bfloat16>(*rows, norm, *quantization)
                                : quantize_rows<float>(*rows, norm, *quantization);
  });
  return outcome;
}

extern "C" int fxq_quantize_tokens(const Rows* rows, const Norm* norm, const Quantization* quantization, const Tokens* tokens) {
  int outcome = DONE;
  with_threads(rows->threads, [&] {
    outcome = rows->is_bfloat16 ? quantize_tokens<bfloat16>(*rows, norm, *quantization, *tokens)
                                : quantize_tokens<float>(*rows, norm, *quantization, *tokens);
  });
  return outcome;
}

extern "C" int fxq_rotate_rows(const Rows* rows, const Rotary* rotary) {
  with_threads(rows->threads, [&] {
    rows->is_bfloat16 ? rotate_rows<bfloat16>(*rows, *rotary) : rotate_rows<float>(*rows, *rotary);
  });
  return DONE;
}
