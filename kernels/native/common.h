// What needs no vectors: sizes, threads, forks, and memory of a thread.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>

// Loops over what lies in registers.
#define FXQ_UNROLL _Pragma("GCC unroll 16")

namespace fxq {

using bfloat16 = uint16_t;

inline long ceil_div(long a, long b) { return (a + b - 1) / b; }
inline long round_up(long a, long b) { return ceil_div(a, b) * b; }

// Threads that have enough to do: waking one up costs some microseconds.
inline int busy_threads(int threads, double work, double least) {
  return static_cast<int>(std::max(1.0, std::min<double>(threads, work / least)));
}

// Whether this process is a fork, of one that may have used threads of OpenMP: torch's are from the same library.
inline bool forked = false;

// Calls f, which may start threads. After a fork OpenMP waits for the parent's threads for ever, but only in a thread
// that had used them before: a new one gets threads of its own.
template <typename F>
void with_threads(int threads, F f) {
  if (threads > 1 && forked) {
    std::thread(f).join();
  } else {
    f();
  }
}

// What a row of int8 that is not finite begins with, as fxq.numerics.poison: 127 where the bit is set, else -128.
constexpr uint32_t POISON = 0xB1E94D36;
constexpr long POISON_LEAST = 16, POISON_MOST = 32;

// Memory of a thread that grows and is kept: giving large blocks back costs a page fault for every use.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  template <typename T>
  T* get(size_t count) {
    const size_t bytes = round_up(count * sizeof(T) + 64, 64);
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ = std::aligned_alloc(64, bytes);
      if (data_ == nullptr) throw std::bad_alloc();
      size_ = bytes;
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace fxq
