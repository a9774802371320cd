// Blocks of numbers as codes of a few bits, with the float operations of fxq/cache/codecs/scalar.py: least and largest
// number of each block, and, with the scales that the codec makes of them, the codes.
#include "calls.h"
#include "vectors.h"

using namespace fxq;

namespace {

constexpr double CODE_WORK = 1 << 16;  // numbers a thread

void measure(const Codes& p, long row) {
  const long blocks = p.size / p.channels;
  for (long block = 0; block < blocks; block++) {
    const float* x = p.x + row * p.size + block * p.channels;
    Floats low = floats(x[0]), high = low;
    for (long i = 0; i + LANES <= p.channels; i += LANES) {
      low = least(load(x + i), low);
      high = greatest(load(x + i), high);
    }
    float lowest = 0.0f - highest(floats(0) - low), most = highest(high);
    for (long i = p.channels / LANES * LANES; i < p.channels; i++) {
      lowest = std::min(x[i], lowest);
      most = std::max(x[i], most);
    }
    p.low[row * blocks + block] = lowest;
    p.high[row * blocks + block] = most;
  }
}

// Codes of LANES numbers of which each `left` count, others are 0.
inline Ints codes_of(Floats x, Floats scale, Floats zero, bool asymmetric, Floats low, Floats high, Ints offset) {
  if (asymmetric) x = x - zero;
  return plus(to_ints(least(greatest(x / scale, low), high)), offset);
}

template <int BITS>
void round_row(const Codes& p, long row) {
  static thread_local Scratch scratch;
  constexpr int EACH = 8 / BITS;
  const bool asymmetric = p.zero != nullptr;
  const int half = (1 << (BITS - 1)) - 1;
  const Floats low = floats(asymmetric ? 0 : -half), high = floats(asymmetric ? 2 * half + 1 : half);
  const Ints offset = ints(asymmetric ? 0 : half);
  const long blocks = p.size / p.channels, padded = round_up(p.size, LANES) + LANES;
  int32_t* codes = scratch.get<int32_t>(padded);
  for (long block = 0; block < blocks; block++) {
    const long start = block * p.channels;
    const float* x = p.x + row * p.size + start;
    const Floats scale = floats(p.scale[row * blocks + block]), zero = floats(asymmetric ? p.zero[row * blocks + block] : 0);
    for (long i = 0; i < p.channels; i += LANES) {
      // What is stored behind a block is written again by the next one.
      store(codes + start + i, codes_of(load(x + i, lanes(p.channels - i)), scale, zero, asymmetric, low, high, offset));
    }
  }
  for (long i = p.size; i < round_up(p.size, EACH); i++) codes[i] = 0;
  uint8_t* to = p.codes + row * ceil_div(p.size, EACH);
  for (long byte = 0; byte < ceil_div(p.size, EACH); byte++) {
    uint32_t found = 0;
    for (int i = 0; i < EACH; i++) found |= static_cast<uint32_t>(codes[byte * EACH + i]) << (i * BITS);
    to[byte] = static_cast<uint8_t>(found);
  }
}

void run(const Codes& p) {
  const int threads = busy_threads(p.threads, static_cast<double>(p.rows) * p.size, CODE_WORK);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (long row = 0; row < p.rows; row++) {
    if (p.codes == nullptr) {
      measure(p, row);
    } else if (p.bits == 8) {
      round_row<8>(p, row);
    } else if (p.bits == 4) {
      round_row<4>(p, row);
    } else {
      round_row<2>(p, row);
    }
  }
}

}  // namespace

extern "C" int fxq_codes(const Codes* p) {
  with_threads(p->threads, [&] { run(*p); });
  return 0;
}
