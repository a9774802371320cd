// What attention multiplies: FloatOperands, CodeOperands and WeightOperands for every instruction set. Rows lie one after the other, a
// panel holds 64 columns; a step is the numbers that one instruction adds up, EACH of a row.
//
//   using Number, Row, Sum;                              // of a panel, of a row, of a product
//   static constexpr int EACH;
//   static long place(long steps, long step, long column);  // of the first number of a column's step in a panel
//   static void multiply(const Row* a, long stride, const Number* b, long steps, Sum* c, long c_stride);
//
// c [TILE_ROWS, 64] = a [TILE_ROWS, EACH * steps] * b, at least one step; strides in elements.
//
// FloatOperands also `add_multiply`, which adds to c, and
//   static void interleave(const Row* rows, long stride, Number* to);  // a step of LANES columns of EACH rows
//
// CodeOperands are for codes of -127..127, to which a Row adds OFFSET. WeightOperands are for weights of 0..32767 times such
// codes:
//   static void interleave(const Ints codes[EACH], Number* to);        // a step of LANES columns
//   static void put_weights(Row* to, Ints weights);                    // LANES of them
#pragma once

#include "product.h"
#include "vectors.h"

#ifdef __AVX512VNNI__
#include "operands_avx512.h"
#else
#include "operands_avx2.h"
#endif
