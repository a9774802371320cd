// What unpack.h needs beside vectors.h, for AArch64.
#pragma once

#include "vectors.h"

namespace fxq {

constexpr int PRODUCT_ROWS = 4, PRODUCT_VECTORS = 2;  // sums that stay in registers

// Codes of the next LANES channels, the first one in the lowest bits.
template <int BITS>
inline Ints codes_at(const uint8_t* p) {
  if constexpr (BITS == 8) {
    const uint16x8_t wide = vmovl_u8(vld1_u8(p));
    return mask_of(vmovl_u16(vget_low_u16(wide)), vmovl_u16(vget_high_u16(wide)));
  } else {
    uint32_t word = 0;
    std::memcpy(&word, p, BITS);
    const Ints down = times(places(), ints(-BITS));
    const uint32x4_t codes = vdupq_n_u32(word), mask = vdupq_n_u32((1 << BITS) - 1);
    return mask_of(vandq_u32(vshlq_u32(codes, down.low), mask), vandq_u32(vshlq_u32(codes, down.high), mask));
  }
}

inline Ints lane_bits() {
  const int32_t bit[LANES] = {1, 2, 4, 8, 16, 32, 64, 128};
  return load_ints(bit);
}

// value in the lanes whose bit is set, 0 elsewhere.
inline Ints where_set(uint32_t bits, int32_t value) {
  const Ints lane = lane_bits(), all = ints(static_cast<int32_t>(bits));
  return both(mask_of(vtstq_s32(all.low, lane.low), vtstq_s32(all.high, lane.high)), ints(value));
}

// Which lanes have the bit.
inline uint32_t set_bits(Ints a, int bit) {
  const int32x4_t one = vdupq_n_s32(1 << bit);
  return bits(mask_of(vtstq_s32(a.low, one), vtstq_s32(a.high, one)));
}

inline Floats round_down(Floats a) { return {vrndmq_f32(a.low), vrndmq_f32(a.high)}; }

}  // namespace fxq
