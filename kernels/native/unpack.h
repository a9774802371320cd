// Encoded keys and values as numbers, some tokens of one head at a time, with the float operations of
// fxq/cache/codecs in their order: but for the product with a basis, results are bit-equal to theirs.
#pragma once

#include "calls.h"
#include "vectors.h"

#ifdef __AVX512VNNI__
#include "unpack_avx512.h"
#elif defined(__aarch64__)
#include "unpack_neon.h"
#else
#include "unpack_avx2.h"
#endif

namespace fxq {

enum Kind { ROWS, CODES, PLANES };

constexpr long UNPACK_TOKENS = 32;  // at a time: their numbers stay in the first-level cache
constexpr long CACHE_LINE = 64, AHEAD = 16;

inline float from_bfloat16(bfloat16 x) {
  const uint32_t word = static_cast<uint32_t>(x) << 16;
  float result;
  std::memcpy(&result, &word, 4);
  return result;
}

// Numbers of up to UNPACK_TOKENS tokens of one head.
class Unpacker {
 public:
  Unpacker(const Side& side, long batch, long head) : s_(side), batch_(batch), head_(head) {
    static thread_local Scratch numbers, values, row;
    stride_ = round_up(s_.size, LANES);
    numbers_ = numbers.get<float>((UNPACK_TOKENS + PRODUCT_ROWS) * stride_);
    values_ = values.get<float>((s_.kind == PLANES ? s_.used : 1) * WIDTH);
    row_ = row.get<uint8_t>(stride_ + 64);
    if (s_.kind == CODES && s_.channels % LANES != 0 && s_.channels != 1) {
      static thread_local Scratch spread;
      spread_ = spread.get<float>(2 * stride_);
    }
  }

  // float32 [count, stride()]: tokens from `token` on, counted from the side's first.
  float* read(long token, long count) {
    token += s_.first;
    if (s_.kind == ROWS) {
      if (s_.is_bfloat16) copy<bfloat16>(token, count); else copy<float>(token, count);
    } else if (s_.kind == PLANES) {
      planes(token, count);
    } else if (s_.table != nullptr) {
      for (long i = 0; i < count; i++) look_up(token + i, numbers_ + i * stride_);
    } else if (s_.bits == 8) {
      blocks<8>(token, count);
    } else if (s_.bits == 4) {
      blocks<4>(token, count);
    } else {
      blocks<2>(token, count);
    }
    return numbers_;
  }

  long stride() const { return stride_; }

 private:
  static constexpr long WIDTH = UNPACK_TOKENS + LANES;  // tokens of a row of coefficients: the first may be no whole byte

  template <typename T>
  void copy(long token, long count) {
    const T* from = static_cast<const T*>(s_.x) + batch_ * s_.x_batch + token * s_.x_row + head_ * s_.x_head;
    for (long i = 0; i < count; i++, from += s_.x_row) {
      for (long d = 0; d < s_.size; d += LANES) store(numbers_ + i * stride_ + d, load(from + d, lanes(s_.size - d)));
    }
  }

  const uint8_t* bytes(long token) const {
    return static_cast<const uint8_t*>(s_.x) + batch_ * s_.x_batch + token * s_.x_row + head_ * s_.x_head;
  }

  long scale_place(long token) const {
    return batch_ * s_.scale_batch + (token / s_.scale_tokens * s_.heads + head_) * (s_.size / s_.channels);
  }

  void look_up(long token, float* to) const {
    const uint8_t* codes = bytes(token);
    const float scale = s_.scale[scale_place(token)];
    for (long d = 0; d < s_.size; d++) to[d] = s_.table[codes[d]] * scale;
  }

  // Asks for the row and scales that come AHEAD tokens later: rows of one head lie too far apart for the CPU to foresee.
  void ask_ahead(long token, long row) const {
    const uint8_t* codes = bytes(token + AHEAD);
    for (long i = 0; i < row; i += CACHE_LINE) __builtin_prefetch(codes + i);
    if (s_.scale_tokens == 1) __builtin_prefetch(s_.scale + scale_place(token + AHEAD));
  }

  template <int BITS>
  void blocks(long token, long count) {
    const bool rest = s_.size % LANES != 0;
    for (long i = 0; i < count; i++) {
      const uint8_t* codes = bytes(token + i);
      ask_ahead(token + i, ceil_div(s_.size * BITS, 8));
      if (rest) {
        std::memcpy(row_, codes, ceil_div(s_.size * BITS, 8));
        codes = row_;
      }
      const long place = scale_place(token + i);
      float* to = numbers_ + i * stride_;
      if (s_.zero == nullptr) {
        scaled<BITS, false>(codes, s_.scale + place, nullptr, to);
      } else {
        scaled<BITS, true>(codes, s_.scale + place, s_.zero + place, to);
      }
      if (s_.stages) add_centroids(token + i, to);
    }
  }

  template <int BITS, bool ZERO>
  void scaled(const uint8_t* codes, const float* scale, const float* zero, float* to) const {
    const Ints offset = ints(s_.offset);
    const auto numbers = [&](long d, Floats factor, Floats least) {
      Floats v = to_floats(minus(codes_at<BITS>(codes + d * BITS / 8), offset)) * factor;
      if (ZERO) v = v + least;
      store(to + d, v);
    };
    const auto each = [&](auto factor, auto least) {
      for (long d = 0; d < s_.size; d += LANES) numbers(d, factor(d), ZERO ? least(d) : floats(0));
    };
    if (spread_ != nullptr) {
      for (long d = 0; d < s_.size; d++) spread_[d] = scale[d / s_.channels];
      if (ZERO) for (long d = 0; d < s_.size; d++) spread_[stride_ + d] = zero[d / s_.channels];
      each([&](long d) { return load(spread_ + d); }, [&](long d) { return load(spread_ + stride_ + d); });
    } else if (s_.channels == 1) {
      each([&](long d) { return load(scale + d, lanes(s_.size - d)); },
           [&](long d) { return load(zero + d, lanes(s_.size - d)); });
    } else {
      for (long block = 0, d = 0; d < s_.size; block++) {
        const Floats factor = floats(scale[block]), least = floats(ZERO ? zero[block] : 0);
        for (const long end = d + s_.channels; d < end; d += LANES) numbers(d, factor, least);
      }
    }
  }

  void add_centroids(long token, float* to) const {
    const uint8_t* ids = s_.ids + batch_ * s_.ids_batch + token * s_.ids_row;
    for (long stage = 0; stage < s_.stages; stage++) {
      const long bit = (head_ * s_.stages + stage) * s_.id_bits;
      const long id = std::min<long>((ids[bit / 8] >> (bit % 8)) & ((1 << s_.id_bits) - 1), s_.count - 1);
      const bfloat16* from =
          s_.centroids + batch_ * s_.centroids_batch + ((stage * s_.heads + head_) * s_.count + id) * s_.size;
      long d = 0;
      for (; d + LANES <= s_.size; d += LANES) store(to + d, load(to + d) + load(from + d));
      if (d < s_.size) store(to + d, load(to + d) + load(from + d, lanes(s_.size - d)));
    }
  }

  // Coefficients of the group of a head to values_ [used, WIDTH] from a whole byte on, then to numbers_.
  void planes(long token, long count) {
    const long group = s_.groups == 1 ? 0 : head_, lead = token % 8;
    const long fitted = (s_.fitted == 1 ? 0 : batch_) * s_.groups + group;
    const uint8_t* x = static_cast<const uint8_t*>(s_.x) + batch_ * s_.x_batch;
    for (long i = 0; i < s_.used; i++) {
      const long at = fitted * s_.rank + i;
      coefficients(x + s_.plane[at] * s_.x_row, token / 8, lead + count, s_.width[at], s_.step[at], values_ + i * WIDTH);
    }
    if (s_.basis == nullptr) {
      for (long i = 0; i < s_.used; i++) {
        for (long t = 0; t < count; t++) numbers_[t * stride_ + i] = values_[i * WIDTH + lead + t];
      }
      return;
    }
    const long own = s_.groups == 1 ? head_ * s_.size : 0;
    const float* basis = s_.basis + fitted * s_.used * s_.channels + own;
    const float* mean = s_.mean + fitted * s_.channels + own;
    for (long t = 0; t < count; t += PRODUCT_ROWS) {
      long d = 0;
      for (; d + PRODUCT_VECTORS * LANES <= s_.size; d += PRODUCT_VECTORS * LANES) {
        product<PRODUCT_VECTORS>(lead + t, basis + d, mean + d, numbers_ + t * stride_ + d, ALL);
      }
      for (; d < s_.size; d += LANES) {
        product<1>(lead + t, basis + d, mean + d, numbers_ + t * stride_ + d, lanes(s_.size - d));
      }
    }
  }

  // Tokens of one coefficient, the first in the lowest bit of byte `start` of its planes; 0 where it has no bits.
  void coefficients(const uint8_t* plane, long start, long count, int width, float step, float* to) const {
    const Floats half = floats(0.5f), centre = floats(width ? static_cast<float>(1 << width) * 0.5f : 0.5f);
    for (long t = 0; t < count; t += LANES) {
      Ints code = ints(0);
      const long byte = start + t / 8;
      const bool whole = byte + LANES / 8 <= s_.plane_bytes;
      for (int bit = 0; bit < width; bit++) {
        const uint8_t* from = plane + bit * s_.x_row + byte;
        uint32_t bits = 0;
        if (whole) {
          std::memcpy(&bits, from, LANES / 8);
        } else {
          bits = *from;
        }
        code = plus(code, where_set(bits, 1 << bit));
      }
      store(to + t, (to_floats(code) + half - centre) * floats(step));
    }
  }

  template <int VECTORS>
  void product(long token, const float* basis, const float* mean, float* to, Lanes mask) const {
    Floats sums[PRODUCT_ROWS][VECTORS];
    for (auto& row : sums) for (auto& sum : row) sum = floats(0);
    for (long i = 0; i < s_.used; i++) {
      Floats b[VECTORS];
      for (int v = 0; v < VECTORS; v++) b[v] = load(basis + i * s_.channels + v * LANES, mask);
      for (int r = 0; r < PRODUCT_ROWS; r++) {
        const Floats a = floats(values_[i * WIDTH + token + r]);
        for (int v = 0; v < VECTORS; v++) sums[r][v] = fmadd(a, b[v], sums[r][v]);
      }
    }
    for (int r = 0; r < PRODUCT_ROWS; r++) {
      for (int v = 0; v < VECTORS; v++) store(to + r * stride_ + v * LANES, sums[r][v] + load(mean + v * LANES, mask));
    }
  }

  const Side& s_;
  long batch_, head_, stride_;
  float *numbers_, *values_, *spread_ = nullptr;
  uint8_t* row_;
};

// The next `left` numbers of a row, LANES at most, as T.
template <typename T>
inline void finish(Floats v, long left, const float* cos, const float* sin, T* to) {
  if (cos != nullptr) v = rotate(rounded<T>(v), load_twice(cos, left), load_twice(sin, left));
  store(to, v, lanes(left));
}

// float32 rows as T; keys are rounded before their rotation as in a dense cache.
template <typename T>
inline void finish(const float* row, long size, const float* cos, const float* sin, T* to) {
  long d = 0;
  const auto at = [&](const float* table) { return table == nullptr ? nullptr : table + d / 2; };
  for (; d + LANES <= size; d += LANES) finish(load(row + d), LANES, at(cos), at(sin), to + d);
  if (d < size) finish(load(row + d), size - d, at(cos), at(sin), to + d);
}

// Tokens of one head as T, asked for one after the other in ascending order, with the tables of the side's first token or
// null. On a thread no more than one lives at a time.
template <typename T>
class Decoded {
 public:
  Decoded(const Side& side, const float* cos, const float* sin, long batch, long head, long end)
      : unpacker_(side, batch, head), size_(side.size), end_(end), cos_(cos), sin_(sin) {}

  void get(long token, T* to) {
    if (token >= first_ + count_) {
      first_ = token;
      count_ = std::min(UNPACK_TOKENS, end_ - token);
      numbers_ = unpacker_.read(token, count_);
    }
    const long at = token * (size_ / 2);
    finish(numbers_ + (token - first_) * unpacker_.stride(), size_, cos_ ? cos_ + at : nullptr, sin_ ? sin_ + at : nullptr, to);
  }

 private:
  Unpacker unpacker_;
  long size_, end_, first_ = 0, count_ = 0;
  const float *cos_, *sin_, *numbers_ = nullptr;
};

}  // namespace fxq
