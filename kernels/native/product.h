// The product of int8 rows with panels: what linear.cpp asks of every instruction set. A class Product holds some rows
// as its inner loop reads them:
//
//   static constexpr double LEAST_WORK;        // multiply-adds that are worth a thread
//   static constexpr long ROWS;                // a Product has a multiple of them, but the last
//   static constexpr int OFFSET;               // 128 where the instructions want q unsigned, or 0
//   static constexpr bool READS_PACKED;        // whether it takes packed panels as they are, or widened to int8
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

// Steps of four channels each that hold the segments: rows of a panel, or where weights are packed half rows.
struct Segments {
  long normal, outlier;

  explicit Segments(const Linear& p) : normal(steps_of(p.split, p.packed)), outlier(steps_of(p.width - p.split, p.packed)), each_(p.packed ? 2 : 1) {}
  long steps() const { return normal + outlier; }
  long panel_rows() const { return steps() / each_; }  // without those of the sums

 private:
  static long steps_of(long channels, bool packed) { return packed ? 2 * ceil_div(channels, 8) : ceil_div(channels, 4); }

  long each_;
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
