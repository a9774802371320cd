// Quantization of rows for sets that do not compress bytes, AVX2 and AArch64; see quantizer.h.
#pragma once

#include <vector>

#include "calls.h"
#include "vectors.h"

namespace fxq {

inline float at(const float* row, long k) { return row[k]; }

inline float at(const bfloat16* row, long k) {
  const uint32_t word = static_cast<uint32_t>(row[k]) << 16;
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

// Where both segments keep the channels' order, as Q-ARVD's do, the whole row is quantized in place with the scale of the
// normal ones and the runs of bytes between outliers are moved together. Others are picked one by one: a gather
// instruction is no faster.
class Quantizer {
 public:
  explicit Quantizer(const Quantization& q) : q_(q), normal_(round_up(q.width, LANES), 0) {
    for (long k = 0; q.perm != nullptr && k < q.width; k++) inside_ = inside_ && 0 <= q.perm[k] && q.perm[k] < q.width;
    if (!inside_) return;
    in_place_ = q.perm == nullptr || (ascending(0, q.split) && ascending(q.split, q.width));
    for (long k = 0; k < q.split; k++) {
      const long from = q.perm == nullptr || !in_place_ ? k : q.perm[k];
      normal_[from] = -1;
      if (q.perm == nullptr || !in_place_) continue;
      if (runs_.empty() || from != runs_.back().from + runs_.back().length) runs_.push_back({from, k, 0});
      runs_.back().length++;
    }
  }

  bool inside() const { return inside_; }

  template <typename T>
  void run_static(const Group& normal, const Group& outlier, const T* row, int8_t* out) const {
    Watch watch;
    run(normal, outlier, row, out, watch);
    if (normal.broken || outlier.broken || watch.broken()) poison(out, q_.width);
  }

  template <typename T>
  void run(const Group& normal, const Group& outlier, const T* row, int8_t* out, Watch& watch) const {
    const long rest = q_.width - q_.split;
    if (q_.perm == nullptr) {
      in_order(normal, row, q_.split, out, watch);
      in_order(outlier, row + q_.split, rest, out + q_.split, watch);
      return;
    }
    static thread_local Scratch byte_scratch;
    if (in_place_) {
      auto* bytes = byte_scratch.get<int8_t>(q_.width + 64);
      in_order(normal, row, q_.width, bytes, watch);
      for (const Run& run : runs_) move(bytes + run.from, run.length, out + run.to, q_.width - run.to);
    } else {
      in_order(normal, picked(row, 0, q_.split), q_.split, out, watch);
    }
    in_order(outlier, picked(row, q_.split, q_.width), rest, out + q_.split, watch);
  }

  // They are compared as integers.
  template <typename T>
  void largest(const T* row, float* top) const {
    Ints normal = ints(0), outlier = normal;
    each(row, [&](Ints v, Ints mask) {
      v = both(v, ints(0x7FFFFFFF));
      normal = greatest(normal, both(mask, v));
      outlier = greatest(outlier, without(mask, v));
    });
    put<int32_t>(normal, top);
    put<int32_t>(outlier, top + 1);
  }

  // As signed integers positive floats are ordered and above the negative ones, as unsigned ones these are above all
  // others, the least on top: NaN, of its sign, is the largest or the least.
  template <typename T>
  void range(const T* row, float* top, float* least) const {
    Ints tops[2] = {ints(0), ints(0)}, leasts[2] = {ints(INT32_MIN), ints(INT32_MIN)};  // -0.0
    each(row, [&](Ints v, Ints mask) {
      const Ints parts[2] = {both(mask, v), without(mask, v)};
      for (int g = 0; g < 2; g++) {
        tops[g] = greatest(tops[g], parts[g]);
        leasts[g] = greatest_unsigned(leasts[g], parts[g]);
      }
    });
    for (int g = 0; g < 2; g++) {
      put<int32_t>(tops[g], top + g);
      put<uint32_t>(leasts[g], least + g);
    }
  }

 private:
  struct Run {
    long from, to, length;
  };

  bool ascending(long from, long to) const {
    for (long k = from + 1; k < to; k++)
      if (q_.perm[k] <= q_.perm[k - 1]) return false;
    return true;
  }

  // Channels of the permutation in its order, padded with zeros to a whole vector.
  template <typename T>
  const float* picked(const T* row, long from, long to) const {
    static thread_local Scratch scratch;
    float* out = scratch.get<float>(round_up(to - from, LANES));
    for (long k = from; k < to; k++) out[k - from] = at(row, q_.perm[k]);
    std::fill(out + (to - from), out + round_up(to - from, LANES), 0.0f);
    return out;
  }

  // f(bits of 8 channels, all ones where they are normal) over a row; padding is 0.
  template <typename T, typename F>
  void each(const T* row, F f) const {
    if (!in_place_) {
      const float* all = picked(row, 0, q_.width);
      for (long k = 0; k < q_.width; k += LANES) f(word_of(load(all + k)), load_ints(&normal_[k]));
      return;
    }
    for (long k = 0; k < q_.width; k += LANES) {
      f(word_of(load(row + k, lanes(q_.width - k))), load_ints(&normal_[k]));
    }
  }

  // The float whose bits are the greatest integer of type I.
  template <typename I>
  static void put(Ints v, float* to) {
    I found[LANES];
    store_bytes(found, v);
    const I most = *std::max_element(found, found + LANES);
    std::memcpy(to, &most, sizeof(most));
  }

  // Whole vectors where the `room` allows it: what is written too much is overwritten by what comes next. Most runs are
  // short: two moves without a branch on the length are cheaper than one that is mispredicted.
  static void move(const int8_t* from, long length, int8_t* to, long room) {
    if (round_up(length, 64) > room) {
      std::memcpy(to, from, length);
      return;
    }
    for (long k = 0; k < length; k += 64) {
      store_bytes(to + k, load_bytes(from + k));
      store_bytes(to + k + 32, load_bytes(from + k + 32));
    }
  }

  template <typename T>
  static void in_order(const Group& group, const T* row, long width, int8_t* out, Watch& watch) {
    long k = 0;
    for (; k + 32 <= width; k += 32) {
      const Floats a = load(row + k), b = load(row + k + 8), c = load(row + k + 16), d = load(row + k + 24);
      watch.see<0>(a);
      watch.see<1>(b);
      watch.see<2>(c);
      watch.see<3>(d);
      store_bytes(out + k, to_bytes(group.integers(a), group.integers(b), group.integers(c), group.integers(d)));
    }
    for (; k < width; k += LANES) {
      const Lanes mask = lanes(width - k);
      const Floats v = load(row + k, mask);
      watch.see(v);
      store(out + k, group.quantize(v), mask);
    }
  }

  const Quantization& q_;
  bool inside_ = true, in_place_ = false;
  std::vector<int32_t> normal_;  // [width], -1 for a normal channel: of the row, or where it is picked, in the new order
  std::vector<Run> runs_;
};

}  // namespace fxq
