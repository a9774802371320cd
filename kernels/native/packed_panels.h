// Panels of 4-bit weights, two steps in a row of bytes (fxq/kernels/gemm/panels.py), as the products read panels.
#pragma once

#include <cstdint>

#include "product.h"

namespace fxq {

// [2 * rows][TILE_COLUMNS][4] int8 of `rows` rows; compilers make vectors of it.
inline void widen(const uint8_t* from, long rows, int8_t* to) {
  constexpr int ROW = 4 * TILE_COLUMNS;
  for (long row = 0; row < rows; row++, from += ROW, to += 2 * ROW) {
    for (int i = 0; i < ROW; i += 64) __builtin_prefetch(from + 8 * ROW + i);
    for (int i = 0; i < ROW; i++) to[i] = static_cast<int8_t>((from[i] & 15) - 8);
    for (int i = 0; i < ROW; i++) to[ROW + i] = static_cast<int8_t>((from[i] >> 4) - 8);
  }
}

}  // namespace fxq
