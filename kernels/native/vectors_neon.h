// Vectors of 8 lanes for AArch64, two registers each; see vectors.h. Lanes, the order of sums and every rounding are those of
// vectors_avx2.h, so results have the same bits.
#pragma once

#include <arm_neon.h>

#include "common.h"

namespace fxq {

struct Floats {
  float32x4_t low, high;
};
struct Ints {
  int32x4_t low, high;
};
using Bytes = int8x8_t;
struct Lanes {
  int count;  // the first ones
};
constexpr int LANES = 8;
constexpr int SUMS = 4;  // that a long sum is split into: an addition waits for the one before
constexpr Lanes ALL = {LANES};

// Lanes of a vector that hold elements, when `left` of them are left.
inline Lanes lanes(long left) { return {static_cast<int>(std::max(0L, std::min<long>(left, LANES)))}; }
inline uint32_t bits(Lanes lanes) { return (1u << lanes.count) - 1; }

inline Ints load_bytes(const void* p) {
  const auto* bytes = static_cast<const int8_t*>(p);
  return {vreinterpretq_s32_s8(vld1q_s8(bytes)), vreinterpretq_s32_s8(vld1q_s8(bytes + 16))};
}
inline void store_bytes(void* p, Ints v) {
  auto* bytes = static_cast<int8_t*>(p);
  vst1q_s8(bytes, vreinterpretq_s8_s32(v.low));
  vst1q_s8(bytes + 16, vreinterpretq_s8_s32(v.high));
}

inline Floats floats(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
inline Ints ints(int32_t x) { return {vdupq_n_s32(x), vdupq_n_s32(x)}; }
inline Ints places() {
  const int32_t first[LANES] = {0, 1, 2, 3, 4, 5, 6, 7};
  return load_bytes(first);
}

inline Floats operator+(Floats a, Floats b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
inline Floats operator-(Floats a, Floats b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
inline Floats operator*(Floats a, Floats b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
inline Floats operator/(Floats a, Floats b) { return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }

// What lanes hold where a comparison says yes is all ones.
inline Ints mask_of(uint32x4_t low, uint32x4_t high) { return {vreinterpretq_s32_u32(low), vreinterpretq_s32_u32(high)}; }
inline Ints counted(Lanes lanes) {
  const Ints place = places();
  return mask_of(vcltq_s32(place.low, vdupq_n_s32(lanes.count)), vcltq_s32(place.high, vdupq_n_s32(lanes.count)));
}
inline Ints more(Floats a, Floats b) { return mask_of(vcgtq_f32(a.low, b.low), vcgtq_f32(a.high, b.high)); }
inline Ints select(Ints mask, Ints a, Ints b) {
  return {vbslq_s32(vreinterpretq_u32_s32(mask.low), a.low, b.low), vbslq_s32(vreinterpretq_u32_s32(mask.high), a.high, b.high)};
}
inline Floats select(Ints mask, Floats a, Floats b) {
  return {vbslq_f32(vreinterpretq_u32_s32(mask.low), a.low, b.low), vbslq_f32(vreinterpretq_u32_s32(mask.high), a.high, b.high)};
}
// A bit for every lane of a mask.
inline uint32_t bits(Ints mask) {
  const Ints place = places();
  const uint32x4_t one = vdupq_n_u32(1);
  const uint32x4_t low = vandq_u32(vreinterpretq_u32_s32(mask.low), vshlq_u32(one, place.low));
  return vaddvq_u32(low) + vaddvq_u32(vandq_u32(vreinterpretq_u32_s32(mask.high), vshlq_u32(one, place.high)));
}

inline Ints word_of(Floats a) { return {vreinterpretq_s32_f32(a.low), vreinterpretq_s32_f32(a.high)}; }  // as it lies in memory
inline Floats float_of(Ints a) { return {vreinterpretq_f32_s32(a.low), vreinterpretq_f32_s32(a.high)}; }

inline Ints both(Ints a, Ints b) { return {vandq_s32(a.low, b.low), vandq_s32(a.high, b.high)}; }
inline Ints without(Ints mask, Ints a) { return {vbicq_s32(a.low, mask.low), vbicq_s32(a.high, mask.high)}; }

inline Floats fmadd(Floats a, Floats b, Floats c) { return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)}; }
inline Floats fnmadd(Floats a, Floats b, Floats c) { return {vfmsq_f32(c.low, a.low, b.low), vfmsq_f32(c.high, a.high, b.high)}; }
inline Floats greatest(Floats a, Floats b) { return select(more(a, b), a, b); }  // b where one is NaN
inline Floats least(Floats a, Floats b) { return select(more(b, a), a, b); }     // b where one is NaN
inline Floats magnitude(Floats a) { return {vabsq_f32(a.low), vabsq_f32(a.high)}; }
inline Floats keep(Floats a, Lanes lanes) { return float_of(both(word_of(a), counted(lanes))); }
inline bool any_nan(Floats a) { return bits(mask_of(vceqq_f32(a.low, a.low), vceqq_f32(a.high, a.high))) != 0xFF; }

inline float sum(Floats a) {
  const float32x4_t s = vaddq_f32(a.low, a.high);
  const float32x2_t t = vadd_f32(vget_low_f32(s), vget_high_f32(s));
  return vget_lane_f32(t, 0) + vget_lane_f32(t, 1);
}

inline uint32_t not_finite(Floats a) { return ~bits(more(floats(INFINITY), magnitude(a))) & 0xFF; }

inline float highest(Floats a) { return vmaxvq_f32(vmaxq_f32(a.low, a.high)); }  // of numbers, none NaN

inline Floats choose(Floats a, Floats b, Lanes first) { return select(counted(first), a, b); }  // a in the lanes of `first`

// a where the number is below zero, b elsewhere.
inline Floats below_zero(Floats number, Floats a, Floats b) { return select(more(floats(0), number), a, b); }

// v and its place where it is greater than the best so far.
inline void take_greater(Floats v, Ints place, Floats& best, Ints& found) {
  const Ints above = more(v, best);
  best = select(above, v, best);
  found = select(above, place, found);
}

inline Ints plus(Ints a, Ints b) { return {vaddq_s32(a.low, b.low), vaddq_s32(a.high, b.high)}; }
inline Ints minus(Ints a, Ints b) { return {vsubq_s32(a.low, b.low), vsubq_s32(a.high, b.high)}; }
inline Ints times(Ints a, Ints b) { return {vmulq_s32(a.low, b.low), vmulq_s32(a.high, b.high)}; }
template <int COUNT>
inline Ints shift_down(Ints a) {
  return {vshrq_n_s32(a.low, COUNT), vshrq_n_s32(a.high, COUNT)};
}
template <int COUNT>
inline Ints shift_up(Ints a) {
  return {vshlq_n_s32(a.low, COUNT), vshlq_n_s32(a.high, COUNT)};
}
inline Ints greatest(Ints a, Ints b) { return {vmaxq_s32(a.low, b.low), vmaxq_s32(a.high, b.high)}; }
inline Ints greatest_unsigned(Ints a, Ints b) {
  const auto most = [](int32x4_t x, int32x4_t y) {
    return vreinterpretq_s32_u32(vmaxq_u32(vreinterpretq_u32_s32(x), vreinterpretq_u32_s32(y)));
  };
  return {most(a.low, b.low), most(a.high, b.high)};
}
inline Ints to_ints(Floats a) { return {vcvtnq_s32_f32(a.low), vcvtnq_s32_f32(a.high)}; }  // nearest, half to even
inline Floats to_floats(Ints a) { return {vcvtq_f32_s32(a.low), vcvtq_f32_s32(a.high)}; }

inline int16x8_t to_words(Ints a) { return vcombine_s16(vqmovn_s32(a.low), vqmovn_s32(a.high)); }
inline Bytes to_bytes(Ints a) { return vqmovn_s16(to_words(a)); }  // of values that int8 holds

// Four vectors of values that int8 holds, in order.
inline Ints to_bytes(Ints a, Ints b, Ints c, Ints d) {
  const int8x16_t low = vcombine_s8(to_bytes(a), to_bytes(b)), high = vcombine_s8(to_bytes(c), to_bytes(d));
  return {vreinterpretq_s32_s8(low), vreinterpretq_s32_s8(high)};
}

inline Bytes choose(Bytes a, Bytes b, Lanes first) {  // a in the lanes of `first`
  const int8_t place[LANES] = {0, 1, 2, 3, 4, 5, 6, 7};
  return vbsl_s8(vclt_s8(vld1_s8(place), vdup_n_s8(static_cast<int8_t>(first.count))), a, b);
}

inline Ints load_ints(const int32_t* p) { return {vld1q_s32(p), vld1q_s32(p + 4)}; }

inline Floats load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }

inline Floats load(const bfloat16* p) {
  const uint16x8_t v = vld1q_u16(p);
  return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(v), 16)), vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(v), 16))};
}

// Other lanes are 0 and their memory is not touched.
template <typename T>
inline Floats load(const T* p, Lanes mask) {
  if (mask.count == LANES) return load(p);
  T part[LANES] = {};
  std::memcpy(part, p, mask.count * sizeof(T));
  return load(part);
}

inline void store(int32_t* p, Ints v) { store_bytes(p, v); }
inline void store(float* p, Floats v) {
  vst1q_f32(p, v.low);
  vst1q_f32(p + 4, v.high);
}
inline void store(int8_t* p, Bytes v) { vst1_s8(p, v); }

// Nearest, half to even; NaN stays NaN. Each number's in the upper half of its lane.
inline Ints to_bfloat16_word(Floats v) {
  const auto word = [](float32x4_t x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
    return vreinterpretq_s32_u32(vbslq_u32(vceqq_f32(x, x), rounded, vdupq_n_u32(0x7FC00000)));
  };
  return {word(v.low), word(v.high)};
}

template <typename T>
inline Floats rounded(Floats v) {  // to T
  if (sizeof(T) == 4) return v;
  return float_of(both(to_bfloat16_word(v), ints(static_cast<int32_t>(0xFFFF0000u))));
}

inline void store(bfloat16* p, Floats v) {
  const Ints word = to_bfloat16_word(v);
  const auto half = [](int32x4_t x) { return vshrn_n_u32(vreinterpretq_u32_s32(x), 16); };
  vst1q_u16(p, vcombine_u16(half(word.low), half(word.high)));
}

// As rows of a square, turned around.
inline void turn(Ints rows[LANES]) {
  const auto block = [](int32x4_t a, int32x4_t b, int32x4_t c, int32x4_t d, int32x4_t to[4]) {
    const int64x2_t ab0 = vreinterpretq_s64_s32(vtrn1q_s32(a, b)), ab1 = vreinterpretq_s64_s32(vtrn2q_s32(a, b));
    const int64x2_t cd0 = vreinterpretq_s64_s32(vtrn1q_s32(c, d)), cd1 = vreinterpretq_s64_s32(vtrn2q_s32(c, d));
    to[0] = vreinterpretq_s32_s64(vtrn1q_s64(ab0, cd0));
    to[1] = vreinterpretq_s32_s64(vtrn1q_s64(ab1, cd1));
    to[2] = vreinterpretq_s32_s64(vtrn2q_s64(ab0, cd0));
    to[3] = vreinterpretq_s32_s64(vtrn2q_s64(ab1, cd1));
  };
  int32x4_t quarters[4][4];  // of the first rows and the last, their first columns and their last
  for (int i = 0; i < 2; i++) {
    const Ints *r = rows + 4 * i;
    block(r[0].low, r[1].low, r[2].low, r[3].low, quarters[i]);
    block(r[0].high, r[1].high, r[2].high, r[3].high, quarters[2 + i]);
  }
  for (int i = 0; i < 4; i++) {
    rows[i] = {quarters[0][i], quarters[1][i]};
    rows[4 + i] = {quarters[2][i], quarters[3][i]};
  }
}

template <typename T, typename V>
inline void store(T* p, V v, Lanes mask) {
  if (mask.count == LANES) return store(p, v);
  T part[LANES];
  store(part, v);
  std::memcpy(p, part, mask.count * sizeof(T));
}

// p[0], p[0], p[1], p[1], ... for the lanes of a vector of `left` elements.
inline Floats load_twice(const float* p, long left) {
  float32x4_t half;
  if (left >= LANES) {
    half = vld1q_f32(p);
  } else {
    float part[LANES / 2] = {};
    std::memcpy(part, p, left / 2 * sizeof(float));
    half = vld1q_f32(part);
  }
  return {vzip1q_f32(half, half), vzip2q_f32(half, half)};
}

// Neighbouring pairs (even, odd) -> (even c - odd s, even s + odd c).
inline Floats rotate(Floats v, Floats c, Floats s) {
  const uint32_t sign[4] = {0x80000000u, 0, 0x80000000u, 0};
  const uint32x4_t even = vld1q_u32(sign);
  const auto half = [&](float32x4_t v, float32x4_t c, float32x4_t s) {
    const float32x4_t other = vmulq_f32(vrev64q_f32(v), s);
    return vfmaq_f32(vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(other), even)), v, c);
  };
  return {half(v.low, c.low, s.low), half(v.high, c.high, s.high)};
}

// exp(x) to about 1e-7 relative; saturates to 0 and infinity.
inline Floats exp(Floats x) {
  x = greatest(floats(-150.0f), least(floats(128.0f), x));  // NaN stays
  const Floats power = x * floats(1.44269504088896f), n = {vrndnq_f32(power.low), vrndnq_f32(power.high)};
  Floats r = fnmadd(n, floats(0.693359375f), x);
  r = fnmadd(n, floats(-2.12194440e-4f), r);
  Floats p = floats(1.0f / 720);
  p = fmadd(p, r, floats(1.0f / 120));
  p = fmadd(p, r, floats(1.0f / 24));
  p = fmadd(p, r, floats(1.0f / 6));
  p = fmadd(p, r, floats(0.5f));
  p = fmadd(p, r, floats(1.0f));
  p = fmadd(p, r, floats(1.0f));
  // 2^n in two halves: n is -217 to 185, an exponent -126 to 127.
  const Ints whole = to_ints(n), half = shift_down<1>(whole), rest = minus(whole, half);
  const auto power_of = [](Ints e) { return float_of(shift_up<23>(plus(e, ints(127)))); };
  return p * power_of(half) * power_of(rest);
}

// 1 / x; 0 at infinity.
inline Floats reciprocal(Floats x) { return floats(1.0f) / x; }

inline void poison_codes(int8_t codes[POISON_MOST]) {
  for (int i = 0; i < POISON_MOST; i++) codes[i] = POISON >> i & 1 ? 127 : -128;
}

inline void poison(int8_t* row, long width) {
  if (width < POISON_LEAST) return;
  int8_t codes[POISON_MOST];
  poison_codes(codes);
  std::memcpy(row, codes, std::min(width, POISON_MOST));
}

inline bool poisoned(const int8_t* row, long width) {
  if (width < POISON_LEAST) return false;
  int8_t codes[POISON_MOST];
  poison_codes(codes);
  return std::memcmp(row, codes, std::min(width, POISON_MOST)) == 0;
}

}  // namespace fxq
