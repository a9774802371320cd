// Vectors of float32 and int32 in the instruction set that this is compiled for. Kernels that are written in these words
// alone serve every one: Floats, Ints and Bytes hold LANES elements, Lanes says which of them count.
#pragma once

#include "common.h"

#ifdef __AVX512VNNI__
#include "vectors_avx512.h"
#elif defined(__aarch64__)
#include "vectors_neon.h"
#else
#include "vectors_avx2.h"
#endif

namespace fxq {

// Whether all numbers seen were finite: 0 * x is 0 or NaN. Four sums, so that none waits for the one before.
class Watch {
 public:
  template <int PLACE = 0>
  void see(Floats v) {
    sums_[PLACE] = fmadd(v, floats(0), sums_[PLACE]);
  }
  bool broken() const { return any_nan((sums_[0] + sums_[1]) + (sums_[2] + sums_[3])); }

 private:
  Floats sums_[4] = {floats(0), floats(0), floats(0), floats(0)};
};

// Quantization of one channel group. NaN becomes the least integer.
struct Group {
  Floats inverse, low, high;
  Ints zero;
  bool broken = false;  // its scale has no finite reciprocal

  // Static: clip(round(x / scale) + zero_point), as fxq.numerics.quantize_input.
  Group(float scale, int32_t zero_point, int bits) {
    const int half = 1 << (bits - 1);
    inverse = floats(1.0f / scale);
    low = floats(static_cast<float>(-half - zero_point));
    high = floats(static_cast<float>(half - 1 - zero_point));
    zero = ints(zero_point);
    broken = !std::isfinite(1.0f / scale);
  }

  // Asymmetric, measured: the scale's reciprocal and a zero point in the range of the integers.
  Group(float inverse, float zero_point, float least, float most)
      : inverse(floats(inverse)),
        low(floats(least - zero_point)),
        high(floats(most - zero_point)),
        zero(ints(static_cast<int32_t>(zero_point))) {}

  // Symmetric: clip(round(x / scale), -high, high), as fxq.numerics.quantize_per_token.
  Group(float scale, float high)
      : inverse(floats(1.0f / scale)), low(floats(-high)), high(floats(high)), zero(ints(0)) {}

  Ints integers(Floats v) const { return plus(to_ints(least(greatest(v * inverse, low), high)), zero); }
  Bytes quantize(Floats v) const { return to_bytes(integers(v)); }
};

}  // namespace fxq
