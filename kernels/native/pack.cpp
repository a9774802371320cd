// Coefficients as bit planes: the encoding that unpack.h reads, with the float operations of fxq/cache/codecs/klt.py.
#include "calls.h"
#include "unpack.h"

using namespace fxq;

namespace {

constexpr double PACK_WORK = 1 << 16;  // numbers a thread

void pack_row(const Packing& p, long row) {
  const int width = p.width[row];
  if (!width) return;
  const float* from = p.values + row * p.tokens;
  uint8_t* to = p.planes + p.plane[row] * p.plane_bytes;
  const float half = static_cast<float>(1 << (width - 1));
  const Floats step = floats(p.step[row]), centre = floats(half), most = floats(2 * half - 1);
  for (long t = 0; t < p.tokens; t += LANES) {
    const Lanes mask = lanes(p.tokens - t);
    const Floats code = round_down(load(from + t, mask) / step) + centre;
    const Ints whole = to_ints(least(greatest(code, floats(0)), most));
    const long bytes = std::min<long>(LANES / 8, p.plane_bytes - t / 8);
    for (int bit = 0; bit < width; bit++) {
      const uint32_t found = set_bits(whole, bit) & bits(mask);
      uint8_t* target = to + bit * p.plane_bytes + t / 8;
      for (long i = 0; i < bytes; i++) target[i] = static_cast<uint8_t>(found >> (8 * i));
    }
  }
}

void run(const Packing& p) {
  const int threads = busy_threads(p.threads, static_cast<double>(p.rows) * p.tokens, PACK_WORK);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (long row = 0; row < p.rows; row++) pack_row(p, row);
}

}  // namespace

extern "C" int fxq_pack_planes(const Packing* p) {
  with_threads(p->threads, [&] { run(*p); });
  return 0;
}
