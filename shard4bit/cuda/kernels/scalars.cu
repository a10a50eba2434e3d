// Where step counts lie on the device (capturable=True): the scalars of a step, and the counting. A thread
// takes one slab. The arithmetic is that of maths/update.py in float64, operation by operation, and rounded
// to float32 once, as numpy rounds it for the host's table: the same bits.

// What a slab's scalars follow from. The host's numpy dtype (tables.py) mirrors this, field by field.
struct Recipe {
  double lr, ahead;   // the latter of a compensated step, else 0; without AdamW's bias correction
  double a, b, c, d;  // AdamW: beta1, beta2, eps, weight_decay; SGD: momentum, dampening, weight_decay, nesterov
  u64 lr_at;          // a tensor with the learning rate; 0: it is lr
  u64 count;          // float32: steps so far
  i32 wide;           // whether that tensor is float64, not float32
  i32 maximize;
  i32 stochastic, pad;  // whether the second moment is rounded so
};

DEVICE double learning_rate(const Recipe& r) {
  if (r.lr_at == 0) return r.lr;
  return r.wide ? *(const double*)r.lr_at : to_double(*(const float*)r.lr_at);
}

// base^exponent by square-and-multiply.
DEVICE double power(double base, u32 exponent) {
  double result = 1.0;
  while (exponent) {
    if (exponent & 1) result = __dmul_rn(result, base);
    base = __dmul_rn(base, base);
    exponent >>= 1;
  }
  return result;
}

DEVICE double rest_of(double x) { return __dsub_rn(1.0, x); }

extern "C" __global__ void adamw_scalars(const Recipe* recipes, Hyper* hypers, i32 count) {
  i32 i = (i32)(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  const Recipe& r = recipes[i];
  u32 step = (u32)*(const float*)r.count + 1;
  double lr = learning_rate(r), beta1 = r.a, beta2 = r.b, eps = r.c;
  double correction = rest_of(power(beta1, step));
  double root = __ddiv_rn(1.0, __dsqrt_rn(rest_of(power(beta2, step))));
  Hyper h;
  h.a = to_float(beta1);
  h.b = to_float(r.maximize ? -rest_of(beta1) : rest_of(beta1));
  h.c = to_float(beta2);
  h.d = to_float(rest_of(beta2));
  h.e = to_float(rest_of(__dmul_rn(lr, r.d)));
  h.f = to_float(__ddiv_rn(lr, correction));
  h.g = to_float(root);
  h.h = to_float(eps);
  h.maximize = r.maximize;
  h.first = 0;
  h.tame = beta2 >= 0.25 && root <= 16384.0 && eps <= 16384.0;
  h.ahead = to_float(__dmul_rn(r.ahead, correction));
  h.draw = r.stochastic ? step : 0u;
  hypers[i] = h;
}

extern "C" __global__ void sgd_scalars(const Recipe* recipes, Hyper* hypers, i32 count) {
  i32 i = (i32)(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  const Recipe& r = recipes[i];
  bool first = *(const float*)r.count == 0.0f;
  Hyper h;
  h.a = to_float(r.a);
  h.b = to_float(first ? 1.0 : rest_of(r.b));
  h.c = to_float(learning_rate(r));
  h.d = to_float(r.c);
  h.e = to_float(r.d);
  h.f = h.g = h.h = 0.0f;
  h.maximize = r.maximize;
  h.first = first;
  h.tame = 0;
  h.ahead = to_float(r.ahead);
  h.draw = 0u;
  hypers[i] = h;
}

// After a step: one more for each slab that took part.
extern "C" __global__ void count_steps(const Recipe* recipes, const Live* lives, i32 count) {
  i32 i = (i32)(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count && lives[i].active) *(float*)recipes[i].count += 1.0f;
}
