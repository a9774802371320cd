// Halves of a k-means iteration: the nearest of the centroids of each token, and the means of clusters. A product is summed in the order of the channels, one after the other, so
// results are the same bit for bit for every instruction set, number of threads and neighbour.
#include <limits>

#include "calls.h"
#include "vectors.h"

using namespace fxq;

namespace {

#ifdef __AVX512VNNI__
constexpr int ROWS = 8;
#else
constexpr int ROWS = 6;
#endif
constexpr int VECTORS = 2;
constexpr long PANEL = VECTORS * LANES;  // centroids that are compared at a time
constexpr long BLOCK = 48;               // tokens that pass by a panel, whole ROWS
constexpr double CLUSTER_WORK = 1 << 20, MEAN_WORK = 1 << 16;  // multiply-adds, additions a thread

#define FXQ_EACH _Pragma("GCC unroll 16")

struct Panels {
  long width, count;       // count: panels of a group
  const float* centroids;  // [groups, count, width, PANEL]
  const float* halves;     // [groups, count, PANEL]: half of |c|^2; infinity where there is no centroid

  const float* at(long group, long panel) const { return centroids + (group * count + panel) * width * PANEL; }
  const float* half(long group, long panel) const { return halves + (group * count + panel) * PANEL; }
};

// ROWS tokens and the centroids of a panel: x.c - |c|^2 / 2 is greatest where the distance is least. A function of its
// own: inside of others compilers keep the sums in memory.
[[gnu::noinline]] void compare(const float* x, long width, const float* panel, const float* half, int32_t first,
                               float* best, int32_t* found) {
  Floats sums[ROWS][VECTORS];
  FXQ_EACH for (int i = 0; i < ROWS; i++) {
    FXQ_EACH for (int j = 0; j < VECTORS; j++) sums[i][j] = floats(0);
  }
  for (long k = 0; k < width; k++) {
    const Floats b0 = load(panel + k * PANEL), b1 = load(panel + k * PANEL + LANES);
    FXQ_EACH for (int i = 0; i < ROWS; i++) {
      const Floats v = floats(x[i * width + k]);
      sums[i][0] = fmadd(v, b0, sums[i][0]);
      sums[i][1] = fmadd(v, b1, sums[i][1]);
    }
  }
  FXQ_EACH for (int i = 0; i < ROWS; i++) {
    Floats most = load(best + i * LANES);
    Ints name = load_ints(found + i * LANES);
    FXQ_EACH for (int j = 0; j < VECTORS; j++) {
      take_greater(sums[i][j] - load(half + j * LANES), plus(places(), ints(first + j * LANES)), most, name);
    }
    store(best + i * LANES, most);
    store(found + i * LANES, name);
  }
}

// The first of the names at the greatest number of a token's lanes.
long first_of(const float* best, const int32_t* found) {
  float most = best[0];
  int32_t name = found[0];
  for (int i = 1; i < LANES; i++) {
    const bool before = best[i] > most || (best[i] == most && found[i] < name);
    most = before ? best[i] : most;
    name = before ? found[i] : name;
  }
  return name;
}

void find(const Clusters& p, const Panels& panels, long group, long begin) {
  static thread_local Scratch rows, bests, names;
  const long count = std::min(BLOCK, p.tokens - begin), padded = round_up(count, ROWS), width = p.width;
  float* x = rows.get<float>(BLOCK * width);
  float* best = bests.get<float>(BLOCK * LANES);
  int32_t* found = names.get<int32_t>(BLOCK * LANES);
  for (long i = 0; i < count; i++) {
    std::memcpy(x + i * width, p.x + group * p.x_group + (begin + i) * p.x_token, width * sizeof(float));
  }
  std::memset(x + count * width, 0, (padded - count) * width * sizeof(float));
  for (long i = 0; i < padded * LANES; i++) best[i] = -std::numeric_limits<float>::infinity();
  std::memset(found, 0, padded * LANES * sizeof(int32_t));
  for (long panel = 0; panel < panels.count; panel++) {
    for (long i = 0; i < padded; i += ROWS) {
      compare(x + i * width, width, panels.at(group, panel), panels.half(group, panel),
              static_cast<int32_t>(panel * PANEL), best + i * LANES, found + i * LANES);
    }
  }
  for (long i = 0; i < count; i++) {
    const long name = first_of(best + i * LANES, found + i * LANES), place = group * p.tokens + begin + i;
    p.names[place] = name;
    if (p.rest == nullptr) continue;
    const float* centroid = p.centroids + (group * p.count + name) * width;
    for (long k = 0; k < width; k++) p.rest[place * width + k] = x[i * width + k] - centroid[k];
  }
}

void fill(const Clusters& p, long group, float* panels, float* halves) {
  for (long c = 0; c < round_up(p.count, PANEL); c++) {
    float* to = panels + c / PANEL * p.width * PANEL + c % PANEL;
    const float* from = p.centroids + (group * p.count + c) * p.width;
    for (long k = 0; k < p.width; k++) to[k * PANEL] = c < p.count ? from[k] : 0;
  }
  for (long c = 0; c < round_up(p.count, PANEL); c += LANES) {
    const float* from = panels + c / PANEL * p.width * PANEL + c % PANEL;
    Floats square = floats(0);
    for (long k = 0; k < p.width; k++) square = fmadd(load(from + k * PANEL), load(from + k * PANEL), square);
    store(halves + c, square * floats(0.5f));
  }
  for (long c = p.count; c < round_up(p.count, PANEL); c++) halves[c] = std::numeric_limits<float>::infinity();
}

void run(const Clusters& p) {
  static thread_local Scratch centroids, squares;
  const long padded = round_up(p.count, PANEL), blocks = ceil_div(p.tokens, BLOCK);
  float* panels = centroids.get<float>(p.groups * padded * p.width);
  float* halves = squares.get<float>(p.groups * padded);
  const double work = static_cast<double>(p.groups) * p.tokens * p.count * p.width;
  const int threads = busy_threads(p.threads, work, CLUSTER_WORK);
  const Panels all{p.width, padded / PANEL, panels, halves};
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (long group = 0; group < p.groups; group++) {
      fill(p, group, panels + group * padded * p.width, halves + group * padded);
    }
#pragma omp for schedule(static)
    for (long item = 0; item < p.groups * blocks; item++) find(p, all, item / blocks, item % blocks * BLOCK);
  }
}

// Sums in the order of the tokens.
void mean(const Clusters& p, long group) {
  static thread_local Scratch scratch;
  int64_t* sizes = scratch.get<int64_t>(p.count);
  std::memset(sizes, 0, p.count * sizeof(int64_t));
  float* sums = p.means + group * p.count * p.width;
  std::memset(sums, 0, p.count * p.width * sizeof(float));
  for (long t = 0; t < p.tokens; t++) {
    const int64_t name = p.names[group * p.tokens + t];
    const float* x = p.x + group * p.x_group + t * p.x_token;
    float* sum = sums + name * p.width;
    for (long k = 0; k < p.width; k++) sum[k] += x[k];
    sizes[name]++;
  }
  for (long c = 0; c < p.count; c++) {
    float* to = sums + c * p.width;
    if (sizes[c] == 0) {
      std::memcpy(to, p.centroids + (group * p.count + c) * p.width, p.width * sizeof(float));
    } else {
      for (long k = 0; k < p.width; k++) to[k] /= static_cast<float>(sizes[c]);
    }
  }
}

void run_means(const Clusters& p) {
  const int threads = busy_threads(p.threads, static_cast<double>(p.groups) * p.tokens * p.width, MEAN_WORK);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (long group = 0; group < p.groups; group++) mean(p, group);
}

}  // namespace

extern "C" int fxq_nearest(const Clusters* p) {
  with_threads(p->threads, [&] { run(*p); });
  return 0;
}

extern "C" int fxq_means(const Clusters* p) {
  with_threads(p->threads, [&] { run_means(*p); });
  return 0;
}
