// Encoded keys or values of a span made dense, for attention that reads tensors.
#include "unpack.h"

using namespace fxq;

namespace {

constexpr double UNPACK_WORK = 1 << 16;  // numbers a thread
constexpr long BLOCK = 256;              // tokens of a head that a thread takes at a time

template <typename T>
void run(const Unpacking& p) {
  const long blocks = ceil_div(p.tokens, BLOCK), size = p.side.size;
  const int threads = busy_threads(p.threads, static_cast<double>(p.batch) * p.tokens * p.heads * size, UNPACK_WORK);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (long item = 0; item < p.batch * blocks * p.heads; item++) {
    const long head = item % p.heads, token = item / p.heads % blocks * BLOCK, batch = item / p.heads / blocks,
               end = std::min(token + BLOCK, p.tokens);
    Decoded<T> tokens(p.side, p.cos, p.sin, batch, head, end);
    for (long i = token; i < end; i++) tokens.get(i, static_cast<T*>(p.out) + ((batch * p.tokens + i) * p.heads + head) * size);
  }
}

}  // namespace

extern "C" int fxq_unpack(const Unpacking* p) {
  with_threads(p->threads, [&] { p->is_bfloat16 ? run<bfloat16>(*p) : run<float>(*p); });
  return 0;
}
