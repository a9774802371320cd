// How rows become int8: what rows.cpp asks of every instruction set. A class Quantizer knows the permutation:
//
//   explicit Quantizer(const Quantization&);
//   bool inside() const;                                          // whether the permutation stays within a row
//   void run_static(normal, outlier, row, int8_t* out) const;     // marks rows that are not finite
//   void run(normal, outlier, row, int8_t* out, Watch&) const;
//   void largest(row, float top[2]) const;                        // magnitudes of the normal and the outlier channels;
//                                                                 // NaN is above all others
//   void range(row, float top[2], float least[2]) const;          // values, or 0; NaN as its sign says
//
// with rows of float32 or bfloat16.
#pragma once

#ifdef __AVX512VNNI__
#include "quantizer_avx512.h"
#else
#include "quantizer_in_order.h"
#endif
