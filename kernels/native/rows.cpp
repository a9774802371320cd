// Row-wise kernels: static quantization, LayerNorm + modulation + quantization, RMSNorm + rotary embedding.
#include <vector>

#include "common.h"

using namespace fxq;

extern "C" struct Quantization {
  const int32_t* perm;        // [width] or null
  const float* scale;         // [groups]
  const int32_t* zero_point;  // [groups]
  long width, split;
  int32_t bits;
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

template <typename T>
inline void widen(const T* from, float* to, long width) {
  for (long k = 0; k < width; k += 16) store(to + k, load(from + k, lanes(width - k)));
}

// How rows are quantized. Where both segments keep the channels' order, as Q-ARVD's do, the normal ones are quantized
// in place and the bytes of the others squeezed out: gathering floats costs several times as much.
class Quantizer {
 public:
  explicit Quantizer(const Quantization& q)
      : q_(q), normal_(q.scale[0], q.zero_point[0], q.bits), outlier_(second(q, q.scale), second(q, q.zero_point), q.bits) {
    if (q.perm == nullptr || !ascending(0, q.split) || !ascending(q.split, q.width)) return;
    masks_.assign(ceil_div(q.width, 64), 0);
    for (long k = 0; k < q.split; k++) masks_[q.perm[k] / 64] |= 1ull << (q.perm[k] % 64);
  }

  // `row` holds floats in L1 and may be read up to 64 elements past its end.
  void run(const float* row, int8_t* out) const {
    if (q_.perm == nullptr) {
      in_order(normal_, row, 0, q_.split, out);
      in_order(outlier_, row, q_.split, q_.width, out);
      return;
    }
    if (masks_.empty()) {
      gather(normal_, row, 0, q_.split, out);
    } else {
      squeeze(row, out);
    }
    gather(outlier_, row, q_.split, q_.width, out);
  }

 private:
  template <typename T>
  static T second(const Quantization& q, const T* values) {
    return values[q.split < q.width ? 1 : 0];
  }

  bool ascending(long from, long to) const {
    for (long k = from + 1; k < to; k++)
      if (q_.perm[k] <= q_.perm[k - 1]) return false;
    return true;
  }

  void in_order(const Group& group, const float* row, long from, long to, int8_t* out) const {
    for (long k = from; k < to; k += 16) {
      const __mmask16 mask = lanes(to - k);
      store(out + k, group.quantize(load(row + k, mask)), mask);
    }
  }

  void gather(const Group& group, const float* row, long from, long to, int8_t* out) const {
    for (long k = from; k < to; k += 16) {
      const __mmask16 mask = lanes(to - k);
      const __m512i index = _mm512_maskz_loadu_epi32(mask, q_.perm + k);
      store(out + k, group.quantize(_mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, index, row, 4)), mask);
    }
  }

  void squeeze(const float* row, int8_t* out) const {
    for (size_t block = 0; block < masks_.size(); block++) {
      const float* from = row + 64 * block;
      __m512i bytes = _mm512_castsi128_si512(normal_.quantize(load(from)));
      bytes = _mm512_inserti32x4(bytes, normal_.quantize(load(from + 16)), 1);
      bytes = _mm512_inserti32x4(bytes, normal_.quantize(load(from + 32)), 2);
      bytes = _mm512_inserti32x4(bytes, normal_.quantize(load(from + 48)), 3);
      const int count = __builtin_popcountll(masks_[block]);
      const __mmask64 kept = count == 64 ? ~0ull : (1ull << count) - 1;
      _mm512_mask_storeu_epi8(out, kept, _mm512_maskz_compress_epi8(masks_[block], bytes));
      out += count;
    }
  }

  const Quantization& q_;
  const Group normal_, outlier_;
  std::vector<uint64_t> masks_;
};

inline float sum(const float* row, long width) {
  __m512 total = _mm512_setzero_ps();
  for (long k = 0; k < width; k += 16) total = _mm512_add_ps(total, load(row + k, lanes(width - k)));
  return _mm512_reduce_add_ps(total);
}

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
  const float inverse = 1.0f / std::sqrt(squares(row, width, mean) / width + p.eps);
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
void quantize_rows(const Rows& r, const Norm* norm, const Quantization& q) {
  const Quantizer quantizer(q);
#pragma omp parallel for schedule(static) num_threads(r.threads) if (r.threads > 1)
  for (long i = 0; i < r.rows; i++) {
    static thread_local Scratch scratch;
    float* row = scratch.get<float>(r.width + 64);
    widen(static_cast<const T*>(r.x) + i * r.x_stride, row, r.width);
    if (norm != nullptr) layer_norm_row<T>(*norm, i, r.width, row);
    quantizer.run(row, static_cast<int8_t*>(r.out) + i * r.width);
  }
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
#pragma omp parallel for schedule(static) num_threads(r.threads) if (r.threads > 1)
  for (long i = 0; i < r.rows; i++) {
    static thread_local Scratch scratch;
    float* row = scratch.get<float>(r.width + 16);
    widen(static_cast<const T*>(r.x) + i * r.x_stride, row, r.width);
    if (p.weight != nullptr) {
      const float inverse = 1.0f / std::sqrt(squares(row, r.width, 0.0f) / r.width + p.eps);
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

extern "C" void fxq_quantize_rows(const Rows* rows, const Norm* norm, const Quantization* quantization) {
  return rows->is_bfloat16 ? quantize_rows<bfloat16>(*rows, norm, *quantization)
                           : quantize_rows<float>(*rows, norm, *quantization);
}

extern "C" void fxq_rotate_rows(const Rows* rows, const Rotary* rotary) {
  return rows->is_bfloat16 ? rotate_rows<bfloat16>(*rows, *rotary) : rotate_rows<float>(*rows, *rotary);
}
