// The inner loop of every product: 6 rows times 64 columns with all 24 accumulators in registers.
//
// The compiler spills accumulators that live in an array, so the loop is written in assembly. One step reads four bytes
// of each row (broadcast) and 256 bytes of the panel: four int8, two int16 or two bfloat16 along the reduction.
#pragma once

#include <cstdint>

namespace fxq {

#define FXQ_ROW(OP, source, c0, c1, c2, c3, t)           \
  "vpbroadcastd " source ", %%zmm" t "\n\t"              \
  OP " %%zmm24, %%zmm" t ", %%zmm" c0 "\n\t"             \
  OP " %%zmm25, %%zmm" t ", %%zmm" c1 "\n\t"             \
  OP " %%zmm26, %%zmm" t ", %%zmm" c2 "\n\t"             \
  OP " %%zmm27, %%zmm" t ", %%zmm" c3 "\n\t"

#define FXQ_ZERO(r) "vpxord %%zmm" r ", %%zmm" r ", %%zmm" r "\n\t"
#define FXQ_ZERO4(r0, r1, r2, r3) FXQ_ZERO(r0) FXQ_ZERO(r1) FXQ_ZERO(r2) FXQ_ZERO(r3)

#define FXQ_LOAD4(row, r0, r1, r2, r3)                   \
  "vmovups " row ", %%zmm" r0 "\n\t"                     \
  "vmovups 64" row ", %%zmm" r1 "\n\t"                   \
  "vmovups 128" row ", %%zmm" r2 "\n\t"                  \
  "vmovups 192" row ", %%zmm" r3 "\n\t"

#define FXQ_STORE4(row, r0, r1, r2, r3)                  \
  "vmovups %%zmm" r0 ", " row "\n\t"                     \
  "vmovups %%zmm" r1 ", 64" row "\n\t"                   \
  "vmovups %%zmm" r2 ", 128" row "\n\t"                  \
  "vmovups %%zmm" r3 ", 192" row "\n\t"

#define FXQ_ROWS(F)                                      \
  F("(%[c])", "0", "1", "2", "3")                        \
  F("(%[c],%[lc])", "4", "5", "6", "7")                  \
  F("(%[c],%[lc],2)", "8", "9", "10", "11")              \
  F("(%[c3])", "12", "13", "14", "15")                   \
  F("(%[c3],%[lc])", "16", "17", "18", "19")             \
  F("(%[c3],%[lc],2)", "20", "21", "22", "23")

#define FXQ_CLEAR(row, r0, r1, r2, r3) FXQ_ZERO4(r0, r1, r2, r3)

// c [6 rows, 64] (+)= a [6 rows, 4 * steps bytes] * b [steps, 64, 4 bytes]; strides la, lc in bytes, steps > 0.
#define FXQ_TILE(NAME, OP, START)                                                                                  \
  static inline void NAME(const void* a, long la, const void* b, long steps, void* c, long lc) {                   \
    const void* a3 = static_cast<const char*>(a) + 3 * la;                                                         \
    void* c3 = static_cast<char*>(c) + 3 * lc;                                                                     \
    asm volatile(FXQ_ROWS(START)                                                                                   \
                 ".p2align 5\n"                                                                                    \
                 "1:\n\t" FXQ_LOAD4("(%[b])", "24", "25", "26", "27")                                              \
                 FXQ_ROW(OP, "(%[a])", "0", "1", "2", "3", "28")                                                   \
                 FXQ_ROW(OP, "(%[a],%[la])", "4", "5", "6", "7", "29")                                             \
                 FXQ_ROW(OP, "(%[a],%[la],2)", "8", "9", "10", "11", "30")                                         \
                 FXQ_ROW(OP, "(%[a3])", "12", "13", "14", "15", "31")                                              \
                 FXQ_ROW(OP, "(%[a3],%[la])", "16", "17", "18", "19", "28")                                        \
                 FXQ_ROW(OP, "(%[a3],%[la],2)", "20", "21", "22", "23", "29")                                      \
                 "add $4, %[a]\n\tadd $4, %[a3]\n\tadd $256, %[b]\n\tdec %[steps]\n\tjnz 1b\n\t"                   \
                 FXQ_ROWS(FXQ_STORE4)                                                                              \
                 : [a] "+r"(a), [a3] "+r"(a3), [b] "+r"(b), [steps] "+r"(steps)                                    \
                 : [la] "r"(la), [lc] "r"(lc), [c] "r"(c), [c3] "r"(c3)                                            \
                 : "memory", "cc", "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", \
                   "zmm10", "zmm11", "zmm12", "zmm13", "zmm14", "zmm15", "zmm16", "zmm17", "zmm18", "zmm19",       \
                   "zmm20", "zmm21", "zmm22", "zmm23", "zmm24", "zmm25", "zmm26", "zmm27", "zmm28", "zmm29",       \
                   "zmm30", "zmm31");                                                                              \
  }

FXQ_TILE(multiply_int8, "vpdpbusd", FXQ_CLEAR)
FXQ_TILE(multiply_int16, "vpdpwssd", FXQ_CLEAR)
FXQ_TILE(multiply_bfloat16, "vdpbf16ps", FXQ_CLEAR)
FXQ_TILE(add_multiply_bfloat16, "vdpbf16ps", FXQ_LOAD4)

}  // namespace fxq
