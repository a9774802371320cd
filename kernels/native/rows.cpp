// Row-wise kernels: quantization with static scales or one per token, LayerNorm + modulation + quantization, RMSNorm + rotary embedding.
#include <vector>

#include "common.h"

using namespace fxq;

extern "C" struct Quantization {
  const int32_t* perm;        // [width] or null
  const float* scale;         // [groups]; null where each token has its own
  const int32_t* zero_point;  // [groups]; null where each token has a scale of its own
  long width, split;
  int32_t bits;
};

extern "C" struct Tokens {
  float* scale;  // [rows, groups], or asymmetric [rows, 2 * groups] with the zero points behind the scales; written
  float least;   // a row whose largest magnitude, or half range, is not above it counts as zero and gets scale 1
  int32_t asymmetric;
};

extern "C" struct Rows {
  const void* x;  // [rows, width], rows x_stride elements apart
  void* out;      // [rows, width]
  long rows, width, x_stride;
  int32_t is_bfloat16, threads;
};

extern "C" struct Norm {
  const float* weight;  // [width] or null
  const float* bias;    // [width] or null
  const void* gain;     // [rows / gain_rows, width] of x's dtype, or null
  const void* shift;
  long gain_rows;
  float eps;
};

extern "C" struct Rotary {
  const float* weight;  // [heads * size] or null
  const float* cos;     // [sequence, size / 2] or null
  const float* sin;
  long sequence, heads, size;
  float eps;
};

namespace {

constexpr double ROWS_WORK = 1 << 16;  // elements a thread

enum Outcome { DONE, OUTSIDE };  // OUTSIDE: the permutation points outside of a row

template <typename T>
inline void widen(const T* from, float* to, long width) {
  for (long k = 0; k < width; k += 16) store(to + k, load(from + k, lanes(width - k)));
}

// Elements at any places of a row as float32.
inline __m512 gather(const float* row, __m512i index, __mmask16 mask) {
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, index, row, 4);
}

// Four bytes that end with the element; the first of a row is read from its front, so that nothing outside is touched.
inline __m512 gather(const bfloat16* row, __m512i index, __mmask16 mask) {
  const __mmask16 first = _mm512_testn_epi32_mask(index, index);
  const __m512i from = _mm512_mask_sub_epi32(index, static_cast<__mmask16>(~first), index, _mm512_set1_epi32(1));
  const __m512i pairs = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), mask, from, row, 2);
  const __m512i high = _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xFFFF0000)));
  return _mm512_castsi512_ps(_mm512_mask_slli_epi32(high, first, pairs, 16));
}

// How rows are quantized. Where both segments keep the channels' order, as Q-ARVD's do, the normal ones are quantized
// in place and the bytes of the others squeezed out: gathering all channels costs several times as much.
class Quantizer {
 public:
  explicit Quantizer(const Quantization& q) : q_(q) {
    for (long k = 0; q.perm != nullptr && k < q.width; k++) inside_ = inside_ && 0 <= q.perm[k] && q.perm[k] < q.width;
    if (!inside_ || q.perm == nullptr || !ascending(0, q.split) || !ascending(q.split, q.width)) return;
    masks_.assign(ceil_div(q.width, 64), 0);
    for (long k = 0; k < q.split; k++) masks_[q.perm[k] / 64] |= 1ull << (q.perm[k] % 64);
  }

  // Whether the permutation stays within a row.
  bool inside() const { return inside_; }

  // Integers of a row, marked when it is not finite.
  template <typename T>
  void run_static(const Group& normal, const Group& outlier, const T* row, int8_t* out) const {
    Watch watch;
    run(normal, outlier, row, out, watch);
    if (normal.broken || outlier.broken || watch.broken()) poison(out, q_.width);
  }

  template <typename T>
  void run(const Group& normal, const Group& outlier, const T* row, int8_t* out, Watch& watch) const {
    if (q_.perm == nullptr) {
      in_order(normal, row, 0, q_.split, out, watch);
      in_order(outlier, row, q_.split, q_.width, out, watch);
      return;
    }
    if (masks_.empty()) {
      gather_all(normal, row, 0, q_.split, out, watch);
    } else {
      squeeze(normal, row, out, watch);
    }
    gather_all(outlier, row, q_.split, q_.width, out, watch);
  }

  // Largest magnitudes of the normal and of the outlier channels. They are compared as integers: NaN is then the largest.
  template <typename T>
  void largest(const T* row, float* top) const {
    __m512i normal = _mm512_setzero_si512(), outlier = normal;
    for (long k = 0; k < q_.width; k += 16) {
      const __mmask16 mask = lanes(q_.width - k), first = normal_lanes(k);
      const __m512 v = _mm512_abs_ps(masks_.empty() && q_.perm ? gathered(row, k, mask) : load(row + k, mask));
      normal = _mm512_mask_max_epi32(normal, first, normal, _mm512_castps_si512(v));
      outlier = _mm512_mask_max_epi32(outlier, static_cast<__mmask16>(~first), outlier, _mm512_castps_si512(v));
    }
    const int32_t bits[2] = {_mm512_reduce_max_epi32(normal), _mm512_reduce_max_epi32(outlier)};
    std::memcpy(top, bits, sizeof(bits));
  }

  // Largest and least values of the normal and of the outlier channels, or 0. As signed integers positive floats are
  // ordered and above the negative ones, as unsigned ones these are above all others, the least on top: NaN, of its
  // sign, is the largest or the least.
  template <typename T>
  void range(const T* row, float* top, float* least) const {
    __m512i tops[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    __m512i leasts[2] = {_mm512_set1_epi32(INT32_MIN), _mm512_set1_epi32(INT32_MIN)};  // -0.0
    for (long k = 0; k < q_.width; k += 16) {
      const __mmask16 mask = lanes(q_.width - k), first = normal_lanes(k), second = static_cast<__mmask16>(~first);
      const __m512i v = _mm512_castps_si512(masks_.empty() && q_.perm ? gathered(row, k, mask) : load(row + k, mask));
      tops[0] = _mm512_mask_max_epi32(tops[0], first, tops[0], v);
      tops[1] = _mm512_mask_max_epi32(tops[1], second, tops[1], v);
      leasts[0] = _mm512_mask_max_epu32(leasts[0], first, leasts[0], v);
      leasts[1] = _mm512_mask_max_epu32(leasts[1], second, leasts[1], v);
    }
    for (int g = 0; g < 2; g++) {
      const int32_t most = _mm512_reduce_max_epi32(tops[g]);
      const uint32_t fewest = _mm512_reduce_max_epu32(leasts[g]);
      std::memcpy(top + g, &most, sizeof(most));
      std::memcpy(least + g, &fewest, sizeof(fewest));
    }
  }

 private:
  // Which of the 16 channels that are read for k and on are normal ones.
  __mmask16 normal_lanes(long k) const {
    return masks_.empty() ? lanes(q_.split - k) : static_cast<__mmask16>(masks_[k / 64] >> (k % 64));
  }

  template <typename T>
  __m512 gathered(const T* row, long k, __mmask16 mask) const {
    return gather(row, _mm512_maskz_loadu_epi32(mask, q_.perm + k), mask);
  }

  bool ascending(long from, long to) const {
    for (long k = from + 1; k < to; k++)
      if (q_.perm[k] <= q_.perm[k - 1]) return false;
    return true;
  }

  template <int PLACE = 0>
  static __m128i watched(const Group& group, __m512 v, Watch& watch) {
    watch.see<PLACE>(v);
    return group.quantize(v);
  }

  // 64 channels.
  template <typename T>
  static __m512i block(const Group& group, const T* row, Watch& watch) {
    __m512i bytes = _mm512_castsi128_si512(watched(group, load(row), watch));
    bytes = _mm512_inserti32x4(bytes, watched<1>(group, load(row + 16), watch), 1);
    bytes = _mm512_inserti32x4(bytes, watched<2>(group, load(row + 32), watch), 2);
    return _mm512_inserti32x4(bytes, watched<3>(group, load(row + 48), watch), 3);
  }

  template <typename T>
  static void in_order(const Group& group, const T* row, long from, long to, int8_t* out, Watch& watch) {
    for (; from + 64 <= to; from += 64) _mm512_storeu_si512(out + from, block(group, row + from, watch));
    for (; from < to; from += 16) {
      const __mmask16 mask = lanes(to - from);
      store(out + from, watched(group, load(row + from, mask), watch), mask);
    }
  }

  template <typename T>
  void gather_all(const Group& group, const T* row, long from, long to, int8_t* out, Watch& watch) const {
    for (long k = from; k < to; k += 16) {
      const __mmask16 mask = lanes(to - k);
      store(out + k, watched(group, gathered(row, k, mask), watch), mask);
    }
  }

  template <typename T>
  void squeeze(const Group& normal, const T* row, int8_t* out, Watch& watch) const {
    const long whole = q_.width / 64;
    for (long i = 0; i < whole; i++, row += 64) out = keep(masks_[i], block(normal, row, watch), out);
    if (q_.width % 64 == 0) return;
    alignas(64) T rest[64] = {};
    std::copy(row, row + q_.width % 64, rest);
    keep(masks_[whole], block(normal, rest, watch), out);
  }

  // The chosen bytes to the front of `out`; returns where the next ones go.
  static int8_t* keep(uint64_t mask, __m512i bytes, int8_t* out) {
    const int count = __builtin_popcountll(mask);
    const __mmask64 front = count == 64 ? ~0ull : (1ull << count) - 1;
    _mm512_mask_storeu_epi8(out, front, _mm512_maskz_compress_epi8(mask, bytes));
    return out + count;
  }

  const Quantization& q_;
  bool inside_ = true;
  std::vector<uint64_t> masks_;
};

inline float sum(const float* row, long width) {
  __m512 total = _mm512_setzero_ps();
  for (long k = 0; k < width; k += 16) total = _mm512_add_ps(total, load(row + k, lanes(width - k)));
  return _mm512_reduce_add_ps(total);
}

// 1 / sqrt(x), NaN where squares of finite numbers have overflown.
inline float inverse_root(float x) { return std::isfinite(x) ? 1.0f / std::sqrt(x) : NAN; }

// Sum of (x - mean)^2.
inline float squares(const float* row, long width, float mean) {
  __m512 total = _mm512_setzero_ps();
  const __m512 center = _mm512_set1_ps(mean);
  for (long k = 0; k < width; k += 16) {
    const __mmask16 mask = lanes(width - k);
    const __m512 d = _mm512_maskz_sub_ps(mask, load(row + k, mask), center);
    total = _mm512_fmadd_ps(d, d, total);
  }
  return _mm512_reduce_add_ps(total);
}

template <typename T>
void layer_norm_row(const Norm& p, long index, long width, float* row) {
  const float mean = sum(row, width) / width;
  const float inverse = inverse_root(squares(row, width, mean) / width + p.eps);
  const long frame = p.gain == nullptr ? 0 : index / p.gain_rows * width;
  for (long k = 0; k < width; k += 16) {
    const __mmask16 mask = lanes(width - k);
    __m512 v = _mm512_mul_ps(_mm512_sub_ps(load(row + k, mask), _mm512_set1_ps(mean)), _mm512_set1_ps(inverse));
    if (p.weight != nullptr) v = _mm512_mul_ps(v, load(p.weight + k, mask));
    if (p.bias != nullptr) v = _mm512_add_ps(v, load(p.bias + k, mask));
    if (p.gain != nullptr) {
      const __m512 gain = _mm512_add_ps(load(static_cast<const T*>(p.gain) + frame + k, mask), _mm512_set1_ps(1.0f));
      v = _mm512_add_ps(_mm512_mul_ps(v, gain), load(static_cast<const T*>(p.shift) + frame + k, mask));
    }
    store(row + k, v, mask);
  }
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
    const T* from = static_cast<const T*>(r.x) + i * r.x_stride;
    int8_t* to = static_cast<int8_t*>(r.out) + i * r.width;
    if (norm == nullptr) {
      quantizer.run_static(normal, outlier, from, to);
      continue;
    }
    static thread_local Scratch scratch;
    float* row = scratch.get<float>(r.width + 16);
    widen(from, row, r.width);
    layer_norm_row<T>(*norm, i, r.width, row);
    quantizer.run_static(normal, outlier, row, to);
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

template <typename T>
int quantize_tokens(const Rows& r, const Quantization& q, const Tokens& tokens) {
  const Quantizer quantizer(q);
  if (!quantizer.inside()) return OUTSIDE;
  const float high = static_cast<float>((1 << (q.bits - 1)) - 1);
  const long groups = q.split < q.width ? 2 : 1;
  const int threads = busy_threads(r.threads, static_cast<double>(r.rows) * r.width, ROWS_WORK);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (long i = 0; i < r.rows; i++) {
    const T* from = static_cast<const T*>(r.x) + i * r.x_stride;
    int8_t* to = static_cast<int8_t*>(r.out) + i * r.width;
    Watch unread;
    if (tokens.asymmetric) {
      float top[2], least[2], measured[4];
      quantizer.range(from, top, least);
      const Group normal = of_range(top[0], least[0], tokens, q.bits, measured, measured + groups);
      float* rest = groups == 2 ? measured + 1 : measured + 2;  // of the group that there is not
      const Group outlier = of_range(top[1], least[1], tokens, q.bits, rest, rest + groups);
      std::copy(measured, measured + 2 * groups, tokens.scale + 2 * groups * i);
      quantizer.run(normal, outlier, from, to, unread);
      continue;
    }
    float scale[2];
    quantizer.largest(from, scale);
    for (float& s : scale) s = !std::isfinite(s) ? NAN : s > tokens.least ? s / high : 1.0f;
    std::copy(scale, scale + groups, tokens.scale + i * groups);
    quantizer.run(of_token(scale[0], high), of_token(scale[1], high), from, to, unread);
  }
  return DONE;
}

// Neighbouring pairs (even, odd) -> (even c - odd s, even s + odd c).
template <typename T>
void rotate_head(const float* row, const float* cos, const float* sin, long size, T* out) {
  const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  for (long k = 0; k < size; k += 16) {
    const __mmask16 mask = lanes(size - k), half = lanes((size - k) / 2) & 0xFF;
    const __m512 v = load(row + k, mask);
    const __m512 c = _mm512_permutexvar_ps(twice, load(cos + k / 2, half));
    const __m512 s = _mm512_permutexvar_ps(twice, load(sin + k / 2, half));
    store(out + k, _mm512_fmaddsub_ps(v, c, _mm512_mul_ps(_mm512_permute_ps(v, 0xB1), s)), mask);
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
      for (long k = 0; k < r.width; k += 16) {
        const __mmask16 mask = lanes(r.width - k);
        const __m512 v = _mm512_mul_ps(load(row + k, mask), _mm512_set1_ps(inverse));
        store(row + k, _mm512_mul_ps(v, load(p.weight + k, mask)), mask);
      }
    }
    T* out = static_cast<T*>(r.out) + i * r.width;
    if (p.cos == nullptr) {
      for (long k = 0; k < r.width; k += 16) store(out + k, load(row + k), lanes(r.width - k));
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

extern "C" int fxq_quantize_tokens(const Rows* rows, const Quantization* quantization, const Tokens* tokens) {
  int outcome = DONE;
  with_threads(rows->threads, [&] {
    outcome = rows->is_bfloat16 ? quantize_tokens<bfloat16>(*rows, *quantization, *tokens)
                                : quantize_tokens<float>(*rows, *quantization, *tokens);
  });
  return outcome;
}

extern "C" int fxq_rotate_rows(const Rows* rows, const Rotary* rotary) {
  with_threads(rows->threads, [&] {
    rows->is_bfloat16 ? rotate_rows<bfloat16>(*rows, *rotary) : rotate_rows<float>(*rows, *rotary);
  });
  return DONE;
}
