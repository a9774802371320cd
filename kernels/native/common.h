// What all native kernels share: 16-lane loads and stores of float32 and bfloat16, exp, and the integer rounding.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>

namespace fxq {

using bfloat16 = uint16_t;
constexpr __mmask16 ALL = 0xFFFF;

inline long ceil_div(long a, long b) { return (a + b - 1) / b; }
inline long round_up(long a, long b) { return ceil_div(a, b) * b; }

// Threads that have enough to do: waking one up costs some microseconds.
inline int busy_threads(int threads, double work, double least) {
  return static_cast<int>(std::max(1.0, std::min<double>(threads, work / least)));
}

// Whether this process is a fork, of one that may have used threads of OpenMP: torch's are from the same library.
inline bool forked = false;

// Calls f, which may start threads. After a fork OpenMP waits for the parent's threads for ever, but only in a thread
// that had used them before: a new one gets threads of its own.
template <typename F>
void with_threads(int threads, F f) {
  if (threads > 1 && forked) {
    std::thread(f).join();
  } else {
    f();
  }
}

// Lanes of a vector of 16 that hold elements, when `left` of them are left.
inline __mmask16 lanes(long left) { return left >= 16 ? ALL : static_cast<__mmask16>((1u << std::max(0L, left)) - 1); }

inline __m512 widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }

inline __m512 load(const float* p) { return _mm512_loadu_ps(p); }
inline __m512 load(const bfloat16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }

// Masked accesses to memory are several times slower than whole ones on some CPUs: a branch chooses.
inline __m512 load(const float* p, __mmask16 mask) { return mask == ALL ? load(p) : _mm512_maskz_loadu_ps(mask, p); }

inline __m512 load(const bfloat16* p, __mmask16 mask) {
  return mask == ALL ? load(p) : widen(_mm256_maskz_loadu_epi16(mask, p));
}

inline void store(float* p, __m512 v, __mmask16 mask = ALL) {
  if (mask == ALL) return _mm512_storeu_ps(p, v);
  _mm512_mask_storeu_ps(p, mask, v);
}

inline __m256i to_bfloat16(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }

inline void store(bfloat16* p, __m512 v, __mmask16 mask = ALL) {
  if (mask == ALL) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bfloat16(v));
  _mm256_mask_storeu_epi16(p, mask, to_bfloat16(v));
}

// exp(x) to about 1e-7 relative; saturates to 0 and infinity.
inline __m512 exp(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896f)), 0x08);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 720);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// 1 / x to about 1e-7 relative for normal x >= 1; 0 at infinity.
inline __m512 reciprocal(__m512 x) {
  const __m512 guess = _mm512_rcp14_ps(x);
  const __m512 error = _mm512_fnmadd_ps(x, guess, _mm512_set1_ps(1.0f));
  const __mmask16 finite = _mm512_cmp_ps_mask(x, _mm512_set1_ps(1e38f), _CMP_LT_OQ);
  return _mm512_mask_fmadd_ps(guess, finite, error, guess);
}

// What a row of int8 that is not finite begins with, as fxq.numerics.poison: 127 where the bit is set, else -128.
constexpr uint32_t POISON = 0xB1E94D36;
constexpr long POISON_LEAST = 16;

inline __mmask32 poison_lanes(long width) { return width >= 32 ? ~0u : (1u << width) - 1; }

inline void poison(int8_t* row, long width) {
  if (width < POISON_LEAST) return;
  const __m256i codes = _mm256_mask_blend_epi8(POISON, _mm256_set1_epi8(-128), _mm256_set1_epi8(127));
  _mm256_mask_storeu_epi8(row, poison_lanes(width), codes);
}

inline bool poisoned(const int8_t* row, long width) {
  if (width < POISON_LEAST) return false;
  const __m256i codes = _mm256_mask_blend_epi8(POISON, _mm256_set1_epi8(-128), _mm256_set1_epi8(127));
  const __mmask32 mask = poison_lanes(width);
  return _mm256_mask_cmpneq_epi8_mask(mask, _mm256_maskz_loadu_epi8(mask, row), codes) == 0;
}

// Whether all numbers seen were finite: 0 * x is 0 or NaN. Four sums, so that none waits for the one before.
class Watch {
 public:
  template <int PLACE = 0>
  void see(__m512 v) {
    sums_[PLACE] = _mm512_fmadd_ps(v, _mm512_setzero_ps(), sums_[PLACE]);
  }
  bool broken() const {
    const __m512 sum = _mm512_add_ps(_mm512_add_ps(sums_[0], sums_[1]), _mm512_add_ps(sums_[2], sums_[3]));
    return _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q) != 0;
  }

 private:
  __m512 sums_[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
};

// Quantization of one channel group. NaN becomes the least integer.
struct Group {
  __m512 inverse, low, high;
  __m512i zero;
  bool broken = false;  // its scale has no finite reciprocal

  // Static: clip(round(x / scale) + zero_point), as fxq.numerics.quantize_input.
  Group(float scale, int32_t zero_point, int bits) {
    const int half = 1 << (bits - 1);
    inverse = _mm512_set1_ps(1.0f / scale);
    low = _mm512_set1_ps(static_cast<float>(-half - zero_point));
    high = _mm512_set1_ps(static_cast<float>(half - 1 - zero_point));
    zero = _mm512_set1_epi32(zero_point);
    broken = !std::isfinite(1.0f / scale);
  }

  // Asymmetric, measured: the scale's reciprocal and a zero point in the range of the integers.
  Group(float inverse, float zero_point, float least, float most)
      : inverse(_mm512_set1_ps(inverse)),
        low(_mm512_set1_ps(least - zero_point)),
        high(_mm512_set1_ps(most - zero_point)),
        zero(_mm512_set1_epi32(static_cast<int32_t>(zero_point))) {}

  // Symmetric: clip(round(x / scale), -high, high), as fxq.numerics.quantize_per_token.
  Group(float scale, float high)
      : inverse(_mm512_set1_ps(1.0f / scale)),
        low(_mm512_set1_ps(-high)),
        high(_mm512_set1_ps(high)),
        zero(_mm512_setzero_si512()) {}

  __m128i quantize(__m512 v) const {
    const __m512 clipped = _mm512_min_ps(_mm512_max_ps(_mm512_mul_ps(v, inverse), low), high);
    return _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(clipped), zero));
  }
};

inline void store(int8_t* p, __m128i v, __mmask16 mask = ALL) {
  if (mask == ALL) return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v);
  _mm_mask_storeu_epi8(p, mask, v);
}

// Memory of a thread that grows and is kept: giving large blocks back costs a page fault for every use.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  template <typename T>
  T* get(size_t count) {
    const size_t bytes = round_up(count * sizeof(T) + 64, 64);
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ = std::aligned_alloc(64, bytes);
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = bytes;
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace fxq
