// The arguments of the functions that Python calls, the same for every instruction set. Their fields and order are
// repeated in fxq/kernels/native/__init__.py.
#pragma once

#include <cstdint>

extern "C" {

struct Linear {
  const int8_t* q;       // [rows, width], rows q_stride bytes apart
  const void* panels;    // int8, or uint8 where they are packed; see fxq/kernels/gemm/panels.py
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
  // all but QUANTIZE
  int32_t per_token, asymmetric;
  int32_t packed;
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
  int32_t activation;  // of what is quantized, as Linear::activation; none behind a norm
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
  // 8-bit attention only: k and v are codes int8 where k_scale is not null
  const float* k_scale;  // [batch, length, heads]
  const float* v_scale;  // [batch, blocks, heads, size], a block is 256 tokens
  long scale_batch, block_batch;  // strides of the batch
  long skip;                      // first tokens that are not read
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
  const struct Span* span;  // encoded keys and values in the place of the one piece, which then says their number; or null
};

// Keys or values of tokens of one span, as they lie or as a codec stores them; see fxq/kernels/attention/forms.py.
// Strides count elements of what x points to.
struct Side {
  const void* x;  // ROWS: numbers [batch, tokens, heads, size]; CODES: bytes [batch, tokens, heads, bytes]; PLANES: [batch, planes, bytes]
  long x_batch, x_row, x_head;  // of PLANES x_row is a plane's
  long heads, first;            // first: token that is read first
  long size;                    // numbers that are made of a token's head: head_dim, or coefficients
  int32_t kind;                 // ROWS, CODES or PLANES
  int32_t is_bfloat16;          // ROWS: else float32
  // CODES: (code - offset) * scale [+ zero] [+ a centroid of each stage], or table[code] * scale
  int32_t bits, offset, id_bits;
  const float* table;  // [256] or null
  const float* scale;  // [batch, tokens / scale_tokens, heads, size / channels]
  const float* zero;   // as scale, or null
  const uint8_t* ids;          // [batch, tokens, ids_row]
  const uint16_t* centroids;   // bfloat16 [batch, stages, heads, count, size]
  long channels;  // that share a scale; PLANES: that share a basis
  long scale_batch, scale_tokens, ids_batch, ids_row, centroids_batch, stages, count;
  // PLANES: basis ((code + 1/2 - 2^(width - 1)) * step) + mean, or what stands in the brackets where basis is null
  const uint8_t* width;  // [fitted, groups, rank]
  const int32_t* plane;  // as width: the first plane of a coefficient
  const float* step;     // as width
  const float* basis;    // [fitted, groups, used, channels]
  const float* mean;     // [fitted, groups, channels]
  long fitted, groups, rank, used, plane_bytes;  // fitted: videos, or 1 for all; used: of rank, others have no bits
};

// Tokens of one span that attention reads.
struct Span {
  Side keys, values;
  const float* cos;  // [tokens, size / 2], or null where keys are rotated
  const float* sin;
  int32_t merges;  // part and lse hold the result for other keys, which that for these is joined with
};

struct Unpacking {
  Side side;
  const float* cos;  // as Span
  const float* sin;
  void* out;         // [batch, tokens, heads, size]
  long batch, tokens, heads;
  int32_t is_bfloat16, threads;
};

struct Packing {
  const float* values;   // [rows, tokens]: coefficients
  const float* step;     // [rows]
  const uint8_t* width;  // [rows], 0 to 8
  const int32_t* plane;  // [rows]: its first plane
  uint8_t* planes;       // [planes, plane_bytes]; written
  long rows, tokens, plane_bytes;
  int32_t threads;
};

// Groups of tokens, each with centroids of its own.
struct Clusters {
  const float* x;          // [groups, tokens, width] with unit stride along width
  const float* centroids;  // [groups, count, width]
  int64_t* names;          // [groups, tokens]: the first of the centroids at the least distance
  float* rest;             // [groups, tokens, width], or null: x less that centroid
  float* means;            // [groups, count, width]: of the tokens of each name; the centroid where there is none
  long groups, tokens, count, width;
  long x_group, x_token;  // strides in elements
  int32_t threads;
};

// Rows of numbers in blocks of `channels`, as fxq/cache/codecs/scalar.py rounds them.
struct Codes {
  const float* x;      // [rows, size]
  float* low;          // [rows, size / channels]; written where codes is null: least and largest number of each block
  float* high;
  const float* scale;  // as low
  const float* zero;   // as low, or null: codes are symmetric
  uint8_t* codes;      // [rows, bytes], the first code in the lowest bits; written
  long rows, size, channels;
  int32_t bits, threads;
};

}  // extern "C"
