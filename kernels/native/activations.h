// Activations of products and of rows.
#pragma once

#include "vectors.h"

namespace fxq {

inline Floats gelu(Floats x) {
  // Abramowitz and Stegun 7.1.26: erf to 1.5e-7.
  const Floats z = x * floats(0.70710678f), a = magnitude(z);
  const Floats t = reciprocal(fmadd(a, floats(0.3275911f), floats(1.0f)));
  Floats p = floats(1.061405429f);
  p = fmadd(p, t, floats(-1.453152027f));
  p = fmadd(p, t, floats(1.421413741f));
  p = fmadd(p, t, floats(-0.284496736f));
  p = fmadd(p, t, floats(0.254829592f));
  const Floats tail = p * t * exp(floats(0) - a * a);
  // 1 + erf(z) is 2 - tail above zero and tail below it.
  return x * floats(0.5f) * below_zero(z, tail, floats(2.0f) - tail);
}

inline Floats gelu_tanh(Floats x) {
  // x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)) is the tanh form.
  const Floats u = x * fmadd(x * x, floats(0.0713548162726f), floats(1.5957691216057f));
  return x * reciprocal(floats(1.0f) + exp(floats(0) - u));
}

// The activations, one function each of the name that fxq/kernels/gemm/activations.py gives it.
#define ACTIVATIONS(EACH) EACH(gelu) EACH(gelu_tanh)

#define CODE(name) name##_code,
enum Activation { none_code, ACTIVATIONS(CODE) ACTIVATION_COUNT };
#undef CODE

inline Floats activate(int32_t activation, Floats y) {
#define APPLY(name) \
  if (activation == name##_code) y = name(y);
  ACTIVATIONS(APPLY)
#undef APPLY
  return y;
}

}  // namespace fxq
