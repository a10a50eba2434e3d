// The update rules (maths/update.py), element by element. RULE is ADAMW or SGD.
#pragma once

// AdamW: a beta1, b 1-beta1, c beta2, d 1-beta2, e keep, f step_size, g root, h eps.
// SGD: a momentum, b rest, c lr, d weight_decay, e nesterov; first: the buffer starts with the gradient.
DEVICE float sgd_gradient(const Hyper& h, float grad, float param) {
  return h.d != 0.0f ? add(grad, mul(param, h.d)) : grad;
}

DEVICE float new_first(const Hyper& h, float old, float grad, float param) {
#if RULE == ADAMW
  return add(mul(old, h.a), mul(grad, h.b));
#else
  grad = sgd_gradient(h, grad, param);
  return h.first ? grad : add(mul(old, h.a), mul(grad, h.b));
#endif
}

DEVICE float new_second(const Hyper& h, float old, float grad) {
  return add(mul(old, h.c), mul(mul(grad, grad), h.d));
}

// What a compensated step moves by: new - (kept - new) ahead, in place; ``word``: the new codes.
DEVICE void lead8(const Hyper& h, const Tables& t, u32 word, float absmax, float* first) {
  float kept[8];
  signed_values8(t, word, kept);
#pragma unroll
  for (i32 k = 0; k < 8; ++k) first[k] = sub(first[k], mul(sub(mul(kept[k], absmax), first[k]), h.ahead));
}

#if RULE == ADAMW
// New parameters, in place. ``tame``: the second moments are in [LEAST_RADICAND, MOST]. If the numerators
// are in their range too, root and quotient are taken without their checks; the bits are the same either way.
// ``largest``: of the new first moments, which compensation makes at most 1 + ahead times larger, since the map
// has a zero: rounding to the nearest entry moves no value by more than its magnitude.
DEVICE void update8(const Hyper& h, float* param, const float* grad, const float* first,
                    const float* second, float largest, bool tame) {
  float least = magnitude(first[0]);
#pragma unroll
  for (i32 k = 1; k < 8; ++k) least = min_number(least, magnitude(first[k]));
  float most = mul(mul(largest, add(1.0f, h.ahead)), h.f);
  bool unchecked = tame && h.tame && mul(least, h.f) >= LEAST_NUMERATOR && most <= MOST;
  if (__builtin_expect(unchecked, 1)) {
#pragma unroll
    for (i32 k = 0; k < 8; ++k) {
      float denominator = add(mul(root_in_range(second[k]), h.g), h.h);
      param[k] = sub(mul(param[k], h.e), divide_in_range(mul(first[k], h.f), denominator));
    }
  } else {
#pragma unroll
    for (i32 k = 0; k < 8; ++k) {
      float denominator = add(mul(root(second[k]), h.g), h.h);
      param[k] = sub(mul(param[k], h.e), divide(mul(first[k], h.f), denominator));
    }
  }
}
#else
DEVICE void update8(const Hyper& h, float* param, const float* grad, const float* first,
                    const float* second, float largest, bool tame) {
#pragma unroll
  for (i32 k = 0; k < 8; ++k) {
    float direction = first[k];
    if (h.e != 0.0f) direction = add(sgd_gradient(h, grad[k], param[k]), mul(first[k], h.a));
    param[k] = sub(param[k], mul(direction, h.c));
  }
}
#endif
