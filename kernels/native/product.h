// The product of int8 rows with panels: what linear.cpp asks of every instruction set. A class Product holds some rows
// as its inner loop reads them:
//
//   static constexpr double LEAST_WORK;        // multiply-adds that are worth a thread
//   static constexpr long ROWS;                // a Product has a multiple of them, but the last
//   static constexpr int OFFSET;               // 128 where the instructions want q unsigned, or 0
//   static long most_rows(const Segments&);    // of one Product
//   Product(const Linear&, const Segments&, long begin, long end);
//   template <typename Done> void multiply(const int8_t* panel, Done done);
//
// `multiply` calls done(row, height, normal, outlier) for all its rows, some at a time, with their int32 sums of
// (q + OFFSET) * w [height, 64] of both segments; `outlier` is null where there is none. With an OFFSET sums wrap modulo
// 2^32, and so does the panel's sum that is subtracted: only the difference has to fit. It does: |q * w| <= 2^14, and a
// row has less than 2^17 channels (fxq.kernels.guards), so no sum of some of its products, in any order, leaves int32.
#pragma once

#include "calls.h"
#include "common.h"

namespace fxq {

constexpr int TILE_ROWS = 6;
constexpr int TILE_COLUMNS = 64;

// Rows of a panel, steps of four channels each, that hold the segments.
struct Segments {
  long normal, outlier;

  explicit Segments(const Linear& p) : normal(ceil_div(p.split, 4)), outlier(ceil_div(p.width - p.split, 4)) {}
  long steps() const { return normal + outlier; }
  long panel_bytes() const { return (steps() + 2) * 4 * TILE_COLUMNS; }
};

}  // namespace fxq

#if defined(__AMX_INT8__)
#include "product_amx.h"
#elif defined(__AVX512VNNI__)
#include "product_avx512.h"
#elif defined(__AVXVNNI__)
#include "tile_avxvnni.h"
#include "tiled_product.h"
namespace fxq {
using Product = TiledProduct<ProductTile>;
}
#elif defined(__ARM_FEATURE_MATMUL_INT8)
#include "tile_i8mm.h"
#include "tiled_product.h"
namespace fxq {
using Product = TiledProduct<ProductTile>;
}
#elif defined(__ARM_FEATURE_DOTPROD)
#include "tile_dotprod.h"
#include "tiled_product.h"
namespace fxq {
using Product = TiledProduct<ProductTile>;
}
#else
#include "product_avx2.h"
#endif
