// Calls the native kernels without Python, for CPUs that are emulated: integers are compared with sums of int64 here, and all
// results are written to a file, which is to be the same for every instruction set.
//
//     kernels hwcap            prints what Linux says of the CPU
//     kernels FILE             writes name, type and bytes of every result; fails where an integer is wrong
#include <sys/auxv.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "calls.h"

extern "C" {
int fxq_linear(const Linear*);
int fxq_quantize_rows(const Rows*, const Norm*, const Quantization*);
int fxq_quantize_tokens(const Rows*, const Norm*, const Quantization*, const Tokens*);
int fxq_rotate_rows(const Rows*, const Rotary*);
int fxq_attention(const Attention*);
int fxq_attention_int8(const Attention*);
int fxq_nearest(const Clusters*);
int fxq_means(const Clusters*);
int fxq_codes(const Codes*);
int fxq_pack_planes(const Packing*);
int fxq_unpack(const Unpacking*);
}

namespace {

using bfloat16 = uint16_t;
FILE* results;

struct Random {
  uint64_t state;

  uint32_t next() { return static_cast<uint32_t>((state = state * 6364136223846793005ull + 1442695040888963407ull) >> 33); }
  float uniform() { return static_cast<float>(next() & 0xFFFFFF) / 0x1p24f; }
  float normal() {  // nearly
    float sum = -6;
    for (int i = 0; i < 12; i++) sum += uniform();
    return sum;
  }
  std::vector<float> normals(size_t count, float scale = 1) {
    std::vector<float> found(count);
    for (float& x : found) x = normal() * scale;
    return found;
  }
  std::vector<int8_t> bytes(size_t count, int low, int high) {
    std::vector<int8_t> found(count);
    for (int8_t& x : found) x = static_cast<int8_t>(low + static_cast<int>(next() % (high - low + 1)));
    return found;
  }
};

bfloat16 rounded(float x) {
  uint32_t word;
  std::memcpy(&word, &x, sizeof(word));
  return std::isnan(x) ? 0x7FC0 : static_cast<bfloat16>((word + 0x7FFF + (word >> 16 & 1)) >> 16);
}

std::vector<bfloat16> rounded(const std::vector<float>& x) {
  std::vector<bfloat16> found;
  for (float v : x) found.push_back(rounded(v));
  return found;
}

void record(const std::string& name, char kind, const void* data, size_t bytes) {
  std::fprintf(results, "%s %c %zu\n", name.c_str(), kind, bytes);
  std::fwrite(data, 1, bytes, results);
}

char kind_of(float) { return 'f'; }
char kind_of(bfloat16) { return 'h'; }
char kind_of(uint8_t) { return 'i'; }
char kind_of(int8_t) { return 'i'; }
char kind_of(int64_t) { return 'i'; }

// A NaN of any bits counts as one.
void settle(float& x) { x = std::isnan(x) ? NAN : x; }
void settle(bfloat16& x) { x = (x & 0x7FFF) > 0x7F80 ? 0x7FC0 : x; }
template <typename T>
void settle(T&) {}

template <typename T>
void record(const std::string& name, std::vector<T> x) {
  for (T& v : x) settle(v);
  record(name, kind_of(T{}), x.data(), x.size() * sizeof(T));
}

long ceil_div(long a, long b) { return (a + b - 1) / b; }

// As fxq/kernels/gemm/panels.py; packed ones are of weights of 4 bits.
std::vector<uint8_t> pack_panels(const std::vector<int8_t>& w, long outputs, long width, long split, bool packed) {
  const long each = packed ? 8 : 4, rows[2] = {ceil_div(split, each), ceil_div(width - split, each)}, size = (rows[0] + rows[1] + 2) * 256;
  std::vector<uint8_t> panels(ceil_div(outputs, 64) * size, packed ? 0x88 : 0);
  for (long n = 0; n < ceil_div(outputs, 64) * 64; n++) {
    uint8_t* panel = panels.data() + n / 64 * size;
    int32_t sums[2] = {0, 0};
    for (long k = 0; k < width && n < outputs; k++) {
      const int group = k >= split;
      const long channel = group ? each * rows[0] + k - split : k;
      uint8_t& byte = panel[channel / each * 256 + n % 64 * 4 + channel % 4];
      const int8_t value = w[n * width + k];
      if (packed) {
        const int shift = channel % each < 4 ? 0 : 4;
        byte = static_cast<uint8_t>((byte & ~(15 << shift)) | (value + 8) << shift);
      } else {
        byte = static_cast<uint8_t>(value);
      }
      sums[group] += 128 * value;
    }
    for (int g = 0; g < 2; g++) std::memcpy(panel + (rows[0] + rows[1] + g) * 256 + n % 64 * 4, &sums[g], 4);
  }
  return panels;
}

struct Shape {
  long rows, width, outputs, split;
  int threads;

  std::string name() const {
    return std::to_string(rows) + "x" + std::to_string(width) + "x" + std::to_string(outputs) + "/" + std::to_string(split) +
           "," + std::to_string(threads);
  }
};

// q and w with all scales 1: a segment's sum is rounded to float32, then the sum of both.
void compare_with_int64(const Shape& s, const std::vector<int8_t>& q, const std::vector<int8_t>& w, const char* what, bool packed = false) {
  const auto panels = pack_panels(w, s.outputs, s.width, s.split, packed);
  const std::vector<float> ones(2 * s.outputs, 1.0f), zeros(s.outputs, 0.0f);
  std::vector<float> out(s.rows * s.outputs);
  Linear p{};
  p.q = q.data(), p.panels = panels.data(), p.weight_scale = ones.data(), p.input_scale = ones.data(), p.offset = zeros.data();
  p.out = out.data(), p.rows = s.rows, p.outputs = s.outputs, p.width = s.width, p.split = s.split, p.q_stride = s.width;
  p.threads = s.threads, p.out_split = s.outputs, p.out_bits = 8, p.packed = packed;
  fxq_linear(&p);
  for (long m = 0; m < s.rows; m++) {
    for (long n = 0; n < s.outputs; n++) {
      int64_t sums[2] = {0, 0};
      for (long k = 0; k < s.width; k++) sums[k >= s.split] += static_cast<int64_t>(q[m * s.width + k]) * w[n * s.width + k];
      const float want = static_cast<float>(sums[0]) + static_cast<float>(sums[1]), got = out[m * s.outputs + n];
      if (got == want) continue;
      std::fprintf(stderr, "%s %s: row %ld, output %ld is %.1f, expected %.1f\n", s.name().c_str(), what, m, n, got, want);
      std::exit(1);
    }
  }
}

void integers(Random& random) {
  const Shape shapes[] = {{16, 131, 130, 128, 1}, {17, 9000, 5, 8999, 2}, {1, 1, 1, 1, 1},      {5, 96, 40, 96, 1},
                          {6, 64, 64, 63, 2},     {7, 75, 19, 50, 1},     {25, 2052, 70, 2001, 2}, {13, 777, 65, 1, 1},
                          {3, 13824, 65, 0, 1},   {4, 40, 3, 0, 1},       {2, 5, 7, 5, 2},      {40, 13824, 3, 13633, 2}};
  for (const Shape& s : shapes) {
    for (int bits = 4; bits <= 8; bits++) {
      const auto w = random.bytes(s.outputs * s.width, -(1 << (bits - 1)), (1 << (bits - 1)) - 1);
      compare_with_int64(s, random.bytes(s.rows * s.width, -128, 127), w, "random");
      if (bits == 4) compare_with_int64(s, random.bytes(s.rows * s.width, -128, 127), w, "packed", true);
    }
    for (int q : {-128, 127}) {
      for (int w : {-128, 127}) {
        const std::vector<int8_t> rows(s.rows * s.width, static_cast<int8_t>(q)), weights(s.outputs * s.width, static_cast<int8_t>(w));
        compare_with_int64(s, rows, weights, "of extremes");
        auto mixed = weights;
        for (size_t i = 0; i < mixed.size(); i += 2) mixed[i] = static_cast<int8_t>(-1 - w);
        compare_with_int64(s, rows, mixed, "of both signs");
      }
    }
  }
  for (long rows = 1; rows <= 20; rows++) {
    for (long split : {1, 75, 131}) {
      const Shape s{rows, 131, 67, split, 1};
      compare_with_int64(s, random.bytes(rows * 131, -128, 127), random.bytes(67 * 131, -128, 127), "rows");
      compare_with_int64(s, random.bytes(rows * 131, -128, 127), random.bytes(67 * 131, -8, 7), "rows, packed", true);
    }
  }
  const long longest = (1 << 17) - 1;
  const std::vector<int8_t> low(7 * longest, -128), high(7 * longest, 127);
  compare_with_int64({7, longest, 2, longest, 1}, low, low, "longest");
  compare_with_int64({7, longest, 2, longest, 1}, low, high, "longest");
}

// Every store, scale and epilogue of the product.
void linears(Random& random) {
  for (const Shape& s : {Shape{7, 75, 70, 50, 1}, Shape{33, 200, 130, 200, 2}, Shape{9, 40, 65, 0, 1}}) {
    auto q = random.bytes(s.rows * s.width, -128, 127);
    for (int bits : {4, 8}) {
      const auto w = random.bytes(s.outputs * s.width, -(1 << (bits - 1)), (1 << (bits - 1)) - 1);
      const auto panels = pack_panels(w, s.outputs, s.width, s.split, bits == 4);
      std::vector<float> weight_scale, scale(4 * s.rows), offset = random.normals(s.outputs, 3);
      for (long i = 0; i < 2 * s.outputs; i++) weight_scale.push_back(0.001f + 0.01f * random.uniform());
      for (float& x : scale) x = 0.005f + 0.05f * random.uniform();
      offset[3] = INFINITY, offset[4] = NAN;
      const long groups = s.split < s.width ? 2 : 1;
      auto zeros = scale;
      for (long m = 0; m < s.rows; m++) {
        for (long g = 0; g < groups; g++) zeros[(2 * m + 1) * groups + g] = static_cast<float>(static_cast<int>(random.next() % 256) - 128);
      }
      Linear p{};
      p.q = q.data(), p.panels = panels.data(), p.weight_scale = weight_scale.data(), p.input_scale = scale.data();
      p.offset = offset.data(), p.rows = s.rows, p.outputs = s.outputs, p.width = s.width, p.split = s.split;
      p.q_stride = s.width, p.threads = s.threads, p.out_split = s.outputs, p.out_bits = 8, p.packed = bits == 4;
      const auto run = [&](const std::string& what, auto zero) {
        std::vector<decltype(zero)> out(s.rows * s.outputs);
        p.out = out.data();
        fxq_linear(&p);
        record("linear " + s.name() + " W" + std::to_string(bits) + " " + what, out);
      };
      for (int store : {0, 1}) {
        p.store = store;
        const auto each = [&](const std::string& what) { store ? run(what + " bfloat16", bfloat16{}) : run(what + " float32", float{}); };
        each("static");
        p.per_token = 1;
        each("per token");
        p.asymmetric = 1;
        p.input_scale = zeros.data();
        each("zero points");
        p.input_scale = scale.data(), p.per_token = p.asymmetric = 0;
      }
      offset[3] = 1, offset[4] = -1;
      const float out_scale[2] = {0.03f, 0.11f};
      const int32_t out_zero[2] = {5, -9};
      p.store = 2, p.out_scale = out_scale, p.out_zero_point = out_zero, p.out_split = s.outputs / 2 + 3;
      for (int activation : {0, 1, 2}) {
        p.activation = activation;
        run("quantized " + std::to_string(activation), int8_t{});
      }
      const auto residual = random.normals(s.rows * s.outputs), gate = random.normals(s.rows * s.outputs);
      const auto residual_half = rounded(residual), gate_half = rounded(gate);
      p.residual_stride = s.outputs, p.gate_rows = 3;
      for (int gated : {0, 1, 2}) {
        p.gate = gated == 0 ? nullptr : gated == 1 ? static_cast<const void*>(gate.data()) : gate_half.data();
        p.gate_is_bfloat16 = gated == 2;
        for (int scales : {0, 1, 2}) {
          p.per_token = scales > 0, p.asymmetric = scales > 1;
          const std::string what = std::to_string(gated) + (scales > 1 ? " zero points" : scales ? " per token" : "");
          p.input_scale = scales > 1 ? zeros.data() : scale.data();
          p.store = 3, p.residual = residual.data();
          run("added float32 " + what, float{});
          p.store = 4, p.residual = residual_half.data();
          run("added bfloat16 " + what, bfloat16{});
        }
      }
    }
  }
}

template <typename T>
std::vector<T> as(const std::vector<float>& x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    return rounded(x);
  }
}

template <typename T>
void rows(Random& random, const std::string& dtype) {
  const long count = 21;
  for (long width : {1L, 40L, 63L, 200L, 301L}) {
    const long split = width > 40 ? width - 23 : width;
    auto numbers = random.normals(count * width, 3);
    for (long k = 0; k < width; k++) numbers[width + k] = 0, numbers[2 * width + k] *= 1e30f, numbers[4 * width + k] += 5;
    numbers[3 * width] = NAN, numbers[5 * width + width / 2] = -INFINITY;
    const auto x = as<T>(numbers);
    std::vector<int32_t> free_order(width), ordered;
    std::iota(free_order.begin(), free_order.end(), 0);
    for (long k = width - 1; k > 0; k--) std::swap(free_order[k], free_order[random.next() % (k + 1)]);
    ordered = free_order;
    std::sort(ordered.begin(), ordered.begin() + split), std::sort(ordered.begin() + split, ordered.end());
    const float scale[2] = {0.02f, 0.3f};
    const int32_t zero[2] = {4, -30};
    const auto weight = random.normals(width), bias = random.normals(width);
    const auto gain = as<T>(random.normals(7 * width)), shift = as<T>(random.normals(7 * width));
    const Norm norms[] = {{nullptr, nullptr, nullptr, nullptr, 1, 1e-6f}, {weight.data(), bias.data(), gain.data(), shift.data(), 3, 1e-6f}};
    for (int order = 0; order < 3; order++) {
      const int32_t* perm = order == 0 ? nullptr : order == 1 ? ordered.data() : free_order.data();
      std::vector<int8_t> out(count * width);
      const Rows r{x.data(), out.data(), count, width, width, sizeof(T) == 2, 2};
      const std::string what = " " + dtype + " " + std::to_string(width) + " order " + std::to_string(order);
      const Quantization q{perm, scale, zero, width, split, 8};
      fxq_quantize_rows(&r, nullptr, &q);
      record("quantize" + what, out);
      for (const Norm& norm : norms) {
        fxq_quantize_rows(&r, &norm, &q);
        record("norm" + what + (norm.gain ? " modulated" : ""), out);
      }
      for (int asymmetric : {0, 1}) {
        for (int bits : {8, 4}) {
          std::vector<float> scales((split < width ? 2 : 1) * (1 + asymmetric) * count);
          const Quantization of_tokens{perm, nullptr, nullptr, width, split, bits};
          Tokens tokens{scales.data(), 1.5e-36f, asymmetric, 0};
          for (const Norm* norm : {static_cast<const Norm*>(nullptr), norms, norms + 1}) {
            const std::string kind = std::string(norm == nullptr ? "" : norm->gain ? " modulated norm" : " norm") +
                                     (asymmetric ? " zero points " : " ") + std::to_string(bits);
            fxq_quantize_tokens(&r, norm, &of_tokens, &tokens);
            record("tokens" + what + kind, out);
            record("scales" + what + kind, scales);
          }
          for (int activation : {1, 2}) {
            const std::string kind = " activation " + std::to_string(activation) + (asymmetric ? " zero points " : " ") + std::to_string(bits);
            tokens.activation = activation;
            fxq_quantize_tokens(&r, nullptr, &of_tokens, &tokens);
            record("tokens" + what + kind, out);
            record("scales" + what + kind, scales);
          }
        }
      }
    }
  }
  for (long size : {2L, 20L, 64L}) {
    const long heads = 3, width = heads * size;
    const auto x = as<T>(random.normals(count * width));
    const auto weight = random.normals(width), cos = random.normals(count * size / 2), sin = random.normals(count * size / 2);
    for (int kind : {0, 1, 2}) {
      std::vector<T> out(count * width);
      const Rows r{x.data(), out.data(), count, width, width, sizeof(T) == 2, 2};
      const Rotary rotary{kind == 1 ? nullptr : weight.data(), kind == 2 ? nullptr : cos.data(), sin.data(), count, heads, size, 1e-6f};
      fxq_rotate_rows(&r, &rotary);
      record("rotate " + dtype + " " + std::to_string(size) + " " + std::to_string(kind), out);
    }
  }
}

template <typename T>
void attentions(Random& random, const std::string& dtype) {
  const long queries = 99, heads = 2, lengths[2] = {300, 41};
  for (long size : {20L, 66L, 128L}) {
    const auto q = as<T>(random.normals(queries * heads * size));
    std::vector<std::vector<T>> numbers;
    std::vector<Piece> pieces;
    std::vector<float> means = random.normals(2 * heads * size, 0.1f);
    for (long length : lengths) {
      for (int i = 0; i < 2; i++) numbers.push_back(as<T>(random.normals(length * heads * size)));
    }
    for (int i = 0; i < 2; i++) {
      const long row = heads * size;
      pieces.push_back({numbers[2 * i].data(), numbers[2 * i + 1].data(), lengths[i], 0, row, size, 0, row, size});
    }
    std::vector<T> out(queries * heads * size);
    std::vector<float> part(out.size()), lse(queries * heads);
    Attention p{};
    p.q = q.data(), p.pieces = pieces.data(), p.means = means.data(), p.piece_count = 2, p.batch = 1, p.rows = queries;
    p.heads = heads, p.size = size, p.q_row = heads * size, p.q_head = size, p.is_bfloat16 = sizeof(T) == 2, p.threads = 2;
    p.part = part.data(), p.lse = lse.data();
    const std::string what = " " + dtype + " " + std::to_string(size);
    fxq_attention(&p);
    record("attention part" + what, part);
    record("attention lse" + what, lse);
    p.part = nullptr, p.lse = nullptr, p.out = out.data();
    fxq_attention(&p);
    record("attention" + what, out);
    fxq_attention_int8(&p);
    record("attention int8" + what, out);
  }
}

void caches(Random& random) {
  const long groups = 2, tokens = 101, count = 21, width = 13;
  const auto x = random.normals(groups * tokens * width), centroids = random.normals(groups * count * width);
  std::vector<int64_t> names(groups * tokens);
  std::vector<float> rest(x.size()), means(centroids.size());
  Clusters clusters{x.data(), centroids.data(), names.data(), rest.data(), means.data(), groups, tokens, count, width, tokens * width, width, 2};
  fxq_nearest(&clusters), fxq_means(&clusters);
  record("names", names), record("rest", rest), record("means", means);

  const long rows = 30, size = 48;
  const auto numbers = random.normals(rows * size);
  for (long channels : {12L, 16L, 48L}) {
    for (int bits : {2, 4, 8}) {
      for (bool asymmetric : {false, true}) {
        const std::string what = " " + std::to_string(channels) + " " + std::to_string(bits) + (asymmetric ? " asymmetric" : "");
        const long blocks = size / channels;
        std::vector<float> low(rows * blocks), high(low.size()), scale;
        Codes codes{numbers.data(), low.data(), high.data(), nullptr, nullptr, nullptr, rows, size, channels, bits, 2};
        fxq_codes(&codes);
        record("low" + what, low), record("high" + what, high);
        for (size_t i = 0; i < low.size(); i++) scale.push_back((high[i] - low[i]) / static_cast<float>((1 << bits) - 1));
        std::vector<uint8_t> found(rows * size * bits / 8);
        codes.scale = scale.data(), codes.zero = asymmetric ? low.data() : nullptr, codes.codes = found.data();
        fxq_codes(&codes);
        record("codes" + what, found);
        // One head of `rows` tokens, read back.
        std::vector<float> dense(rows * size);
        Unpacking unpacking{};
        Side& side = unpacking.side;
        side.x = found.data(), side.x_row = side.x_head = size * bits / 8, side.heads = 1, side.size = size, side.kind = 1;
        side.bits = bits, side.offset = asymmetric ? 0 : (1 << (bits - 1)) - 1, side.scale = scale.data(), side.zero = codes.zero;
        side.channels = channels, side.scale_tokens = 1;
        unpacking.out = dense.data(), unpacking.batch = 1, unpacking.tokens = rows, unpacking.heads = 1, unpacking.threads = 2;
        fxq_unpack(&unpacking);
        record("unpacked" + what, dense);
      }
    }
  }

  const long rank = 9, planes_tokens = 77, plane_bytes = ceil_div(planes_tokens, 8), used = 8, channels = 30;
  const auto values = random.normals(rank * planes_tokens, 4);
  const std::vector<uint8_t> widths = {8, 7, 6, 5, 4, 3, 2, 1, 0};
  std::vector<float> step;
  std::vector<int32_t> plane;
  int32_t planes = 0;
  for (long i = 0; i < rank; i++) step.push_back(0.05f * static_cast<float>(i + 1)), plane.push_back(planes), planes += widths[i];
  std::vector<uint8_t> packed(planes * plane_bytes);
  const Packing packing{values.data(), step.data(), widths.data(), plane.data(), packed.data(), rank, planes_tokens, plane_bytes, 2};
  fxq_pack_planes(&packing);
  record("planes", packed);
  const auto basis = random.normals(used * channels), mean = random.normals(channels);
  const auto cos = random.normals(planes_tokens * channels / 2), sin = random.normals(planes_tokens * channels / 2);
  std::vector<float> dense(planes_tokens * channels);
  Unpacking unpacking{};
  Side& side = unpacking.side;
  side.x = packed.data(), side.x_row = plane_bytes, side.heads = 1, side.size = channels, side.kind = 2, side.channels = channels;
  side.width = widths.data(), side.plane = plane.data(), side.step = step.data(), side.basis = basis.data(), side.mean = mean.data();
  side.fitted = side.groups = 1, side.rank = rank, side.used = used, side.plane_bytes = plane_bytes;
  unpacking.cos = cos.data(), unpacking.sin = sin.data(), unpacking.out = dense.data(), unpacking.batch = 1;
  unpacking.tokens = planes_tokens, unpacking.heads = 1, unpacking.threads = 2;
  fxq_unpack(&unpacking);
  record("unpacked planes", dense);
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 2 && std::string(arguments[1]) == "hwcap") {
    std::printf("%lu %lu\n", getauxval(AT_HWCAP), getauxval(AT_HWCAP2));
    return 0;
  }
  results = count == 2 ? std::fopen(arguments[1], "wb") : nullptr;
  if (results == nullptr) return 2;
  Random random{1};
  integers(random);
  linears(random);
  rows<float>(random, "float32");
  rows<bfloat16>(random, "bfloat16");
  attentions<float>(random, "float32");
  attentions<bfloat16>(random, "bfloat16");
  caches(random);
  return std::fclose(results);
}
