// What attention multiplies: FloatOperands, CodeOperands and WeightOperands for every instruction set. Rows lie one after the other, a
// panel holds 64 columns; a step is the numbers that one instruction adds up, EACH of a row.
//
//   using Number, Row, Sum;                              // of a panel, of a row, of a product
//   static constexpr int EACH;
//   static constexpr long ROWS, STEPS;                      // of a product: of all of them, and what their number divides by
//   static long place(long steps, long step, long column);  // of the first number of a column's step in a panel
//   static void multiply(const Row* a, long stride, const Number* b, long steps, Sum* c, long c_stride);
//
// c [ROWS, 64] = a [ROWS, EACH * steps] * b, at least one step; strides in elements.
//
// FloatOperands and CodeOperands have a Session, which lives as long as a thread multiplies. FloatOperands also
// `add_multiply`, which adds to c, and
//   static Floats exp(Floats x);                                       // as exact as weights of a Number need
//   static void interleave(const Row* rows, long stride, Number* to);  // a step of LANES columns of EACH rows
//
// CodeOperands are for codes of -127..127, to which a Row adds OFFSET. WeightOperands are for weights of 0..32767 times such
// codes:
//   static constexpr long PARTS;                                       // numbers of a row that make a weight
//   static void interleave(const Ints codes[EACH], Number* to);        // a step of LANES columns
//   static void put_weights(Row* to, long part, Ints weights);         // LANES of them, `part` numbers from part to part
#pragma once

#include <algorithm>

#include "product.h"
#include "vectors.h"

#if defined(__AMX_INT8__)
#include "operands_amx.h"
namespace fxq {
using amx::FloatOperands, amx::CodeOperands, amx::WeightOperands;
}
#elif defined(__AVX512VNNI__)
#include "operands_avx512.h"
namespace fxq {
using avx512::FloatOperands, avx512::CodeOperands, avx512::WeightOperands;
}
#elif defined(__aarch64__)
#include "operands_neon.h"
#else
#include "operands_avx2.h"
#endif

namespace fxq {

constexpr long GROUP = 4;  // blocks of queries that go over the keys together

// Rows of a group, such that every thread has one.
inline long query_rows_of_a_group(long rows, int threads) {
  return QUERY_ROWS * std::clamp(rows / (QUERY_ROWS * threads), 1L, GROUP);
}

}  // namespace fxq
