// Quantization of rows for AVX512; see quantizer.h.
#pragma once

#include <immintrin.h>

#include <vector>

#include "calls.h"
#include "vectors.h"

namespace fxq {

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
#ifndef __AVX512VBMI2__
    alignas(64) int8_t all[64];
    _mm512_store_si512(all, bytes);
    for (int8_t* to = out; mask; mask &= mask - 1) *to++ = all[__builtin_ctzll(mask)];
    return out + count;
#else
    const __mmask64 front = count == 64 ? ~0ull : (1ull << count) - 1;
    _mm512_mask_storeu_epi8(out, front, _mm512_maskz_compress_epi8(mask, bytes));
    return out + count;
#endif
  }

  const Quantization& q_;
  bool inside_ = true;
  std::vector<uint64_t> masks_;
};

}  // namespace fxq
