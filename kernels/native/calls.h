// The arguments of the functions that Python calls, the same for every instruction set. Their fields and order are
// repeated in fxq/kernels/native/__init__.py.
#pragma once

#include <cstdint>

extern "C" {

struct Linear {
  const int8_t* q;       // [rows, width], rows q_stride bytes apart
  const int8_t* panels;  // see fxq/kernels/gemm/panels.py
  const float* weight_scale;  // [groups, outputs]
  const float* input_scale;   // [groups]; [rows, groups] per token; asymmetric [rows, 2 * groups], zero points behind the scales
  const float* offset;        // [outputs]
  void* out;                  // [rows, outputs]
  long rows, outputs, width, split, q_stride;
  int32_t store, threads;
  // QUANTIZE
  const float* out_scale;
  const int32_t* out_zero_point;
  long out_split;
  int32_t out_bits, activation;
  // ADD_*: residual [rows, outputs]; gate [rows / gate_rows, outputs], float32 or bfloat16, or null
  const void* residual;
  const void* gate;
  long residual_stride, gate_rows;
  int32_t gate_is_bfloat16;
  // FLOAT32 and BFLOAT16 only
  int32_t per_token, asymmetric;
};

struct Quantization {
  const int32_t* perm;        // [width] or null
  const float* scale;         // [groups]; null where each token has its own
  const int32_t* zero_point;  // [groups]; null where each token has a scale of its own
  long width, split;
  int32_t bits;
};

struct Tokens {
  float* scale;  // [rows, groups], or asymmetric [rows, 2 * groups] with the zero points behind the scales; written
  float least;   // a row whose largest magnitude, or half range, is not above it counts as zero and gets scale 1
  int32_t asymmetric;
};

struct Rows {
  const void* x;  // [rows, width], rows x_stride elements apart
  void* out;      // [rows, width]
  long rows, width, x_stride;
  int32_t is_bfloat16, threads;
};

struct Norm {
  const float* weight;  // [width] or null
  const float* bias;    // [width] or null
  const void* gain;     // [rows / gain_rows, width] of x's dtype, or null
  const void* shift;
  long gain_rows;
  float eps;
};

struct Rotary {
  const float* weight;  // [heads * size] or null
  const float* cos;     // [sequence, size / 2] or null
  const float* sin;
  long sequence, heads, size;
  float eps;
};

struct Piece {
  const void* k;  // [batch, length, heads, size] with unit stride along size
  const void* v;
  long length;
  long k_batch, k_row, k_head;  // strides in elements
  long v_batch, v_row, v_head;
};

struct Attention {
  const void* q;  // [batch, rows, heads, size] with unit stride along size
  void* out;      // [batch, rows, heads * size] of q's dtype, or null
  float* part;    // where out is null: the same, to be merged with the results for other keys,
  float* lse;     // [batch, rows, heads], by the logarithm of the sum of the weights
  const Piece* pieces;
  const float* means;  // 8-bit attention only: [pieces, batch, heads, size], of the keys
  long piece_count, batch, rows, heads, size;
  long q_batch, q_row, q_head;
  int32_t is_bfloat16, threads;
};

}  // extern "C"
