// Arithmetic of the kernels: one IEEE fp32 rounding per call, gradual underflow, no contraction.
//
// CuPy compiles with -ftz=true and multiply-adds fused; instructions written out with their rounding
// mode are left alone. Under the CPU emulator (CUSIM) plain C with -ffp-contract=off gives the same bits.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

#define DEVICE __device__ __forceinline__
#define FULL_MASK 0xffffffffu
#define CANONICAL_NAN 0x7fc00000
#define TINY 1.17549435e-38f  // 2^-126: smaller statistics are stored as 0

#ifdef CUSIM
DEVICE float mul(float a, float b) { return a * b; }
DEVICE float add(float a, float b) { return a + b; }
DEVICE float sub(float a, float b) { return a - b; }
DEVICE float divide(float a, float b) { return a / b; }
DEVICE float root(float a) { return sqrtf(a); }
DEVICE float fma_near(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE float fma_down(float a, float b, float c) { return cusim_fma_rd(a, b, c); }
DEVICE float fma_up(float a, float b, float c) { return cusim_fma_ru(a, b, c); }
DEVICE float max_or_nan(float a, float b) {
  return a != a || b != b ? __uint_as_float(0x7fffffffu) : a > b ? a : b;
}
DEVICE float min_or_nan(float a, float b) {
  return a != a || b != b ? __uint_as_float(0x7fffffffu) : a < b ? a : b;
}
DEVICE float max_number(float a, float b) { return a != a ? b : b != b ? a : a > b ? a : b; }
DEVICE float min_number(float a, float b) { return a != a ? b : b != b ? a : a < b ? a : b; }
DEVICE float magnitude(float a) { return __uint_as_float(__float_as_uint(a) & 0x7fffffffu); }
DEVICE float root_in_range(float a) { return sqrtf(a); }
DEVICE float divide_in_range(float a, float b) { return a / b; }
DEVICE float to_float(double a) { return (float)a; }
DEVICE double to_double(float a) { return (double)a; }
#else
#define BINARY(name, op)                                              \
  DEVICE float name(float a, float b) {                               \
    float r;                                                          \
    asm(op " %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));                \
    return r;                                                         \
  }
#define TERNARY(name, op)                                             \
  DEVICE float name(float a, float b, float c) {                      \
    float r;                                                          \
    asm(op " %0, %1, %2, %3;" : "=f"(r) : "f"(a), "f"(b), "f"(c));    \
    return r;                                                         \
  }
BINARY(mul, "mul.rn.f32")
BINARY(add, "add.rn.f32")
BINARY(sub, "sub.rn.f32")
BINARY(divide, "div.rn.f32")
BINARY(max_or_nan, "max.NaN.f32")
BINARY(min_or_nan, "min.NaN.f32")
BINARY(max_number, "max.f32")
BINARY(min_number, "min.f32")
TERNARY(fma_near, "fma.rn.f32")
TERNARY(fma_down, "fma.rm.f32")
TERNARY(fma_up, "fma.rp.f32")
#define UNARY(name, op)                        \
  DEVICE float name(float a) {                 \
    float r;                                   \
    asm(op " %0, %1;" : "=f"(r) : "f"(a));     \
    return r;                                  \
  }
UNARY(root, "sqrt.rn.f32")
UNARY(magnitude, "abs.f32")
UNARY(negative, "neg.f32")
UNARY(root_guess, "rsqrt.approx.ftz.f32")
UNARY(reciprocal_guess, "rcp.approx.ftz.f32")

DEVICE float to_float(double a) {
  float r;
  asm("cvt.rn.f32.f64 %0, %1;" : "=f"(r) : "d"(a));
  return r;
}

DEVICE double to_double(float a) {
  double r;
  asm("cvt.f64.f32 %0, %1;" : "=d"(r) : "f"(a));
  return r;
}

// The same bits as root() for a in [LEAST_RADICAND, MOST], without its checks.
DEVICE float root_in_range(float a) {
  float guess = root_guess(a);
  float r = mul(a, guess);
  return fma_near(fma_near(negative(r), r, a), mul(guess, 0.5f), r);
}

// 1/b, rounded correctly but for a few b, where it is the neighbour of that.
DEVICE float reciprocal_in_range(float b) {
  float guess = reciprocal_guess(b);
  return fma_near(fma_near(negative(b), guess, 1.0f), guess, guess);
}

// The same bits as divide() for |a| in [LEAST_NUMERATOR, MOST] and b in [2^-50, 2^35], without its checks and its
// second correction, which no a needs (docs/decisions/0023-one-correction-less.md).
DEVICE float divide_in_range(float a, float b) {
  float by = reciprocal_in_range(b);
  float q = mul(a, by);
  return fma_near(fma_near(negative(b), q, a), by, q);
}
#endif

// Ranges in which the unchecked root and quotient round correctly: no remainder underflows.
#define LEAST_RADICAND 7.8886091e-31f   // 2^-100
#define LEAST_NUMERATOR 8.2718061e-25f  // 2^-80
#define MOST 1.0995116e+12f             // 2^40, of both

DEVICE bool is_nan(float a) { return (__float_as_uint(a) & 0x7fffffffu) > 0x7f800000u; }

// A maximum as it is stored.
DEVICE float settle(float stat) {
  if (is_nan(stat)) return __uint_as_float(CANONICAL_NAN);
  return __float_as_uint(stat) < 0x00800000u ? 0.0f : stat;
}

// 1/scale; NaN for a zero scale, which gives code 0.
DEVICE float inverse(float scale) {
  return scale == 0.0f ? __uint_as_float(CANONICAL_NAN) : divide(1.0f, scale);
}

// (x & mask) | bits, and byte ``index`` of x, in one instruction each.
#ifdef CUSIM
DEVICE u32 masked_or(u32 x, u32 mask, u32 bits) { return (x & mask) | bits; }
DEVICE u32 byte_of(u32 x, u32 index) { return (x >> (8 * index)) & 0xffu; }
#else
DEVICE u32 masked_or(u32 x, u32 mask, u32 bits) {
  u32 r;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(x), "r"(mask), "r"(bits));
  return r;
}
DEVICE u32 byte_of(u32 x, u32 index) {
  u32 r;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(r) : "r"(x), "r"(0x4440u | index));
  return r;
}
#endif

#ifdef CUSIM
DEVICE uint4 load16(u64 at) { return *(const uint4*)at; }
DEVICE u32 load4(u64 at) { return *(const u32*)at; }
DEVICE float load_float(u64 at) { return *(const float*)at; }
DEVICE void store4(u64 at, u32 x) { *(u32*)at = x; }
// Predicated: a branch around a store costs three instructions, and these are in the inner loop.
DEVICE void store4_if(bool on, u64 at, u32 x) {
  if (on) *(u32*)at = x;
}
DEVICE void store16_if(bool on, u64 at, uint4 x) {
  if (on) *(uint4*)at = x;
}
#else
// Explicitly global: a pointer out of a table would be accessed generically.
DEVICE uint4 load16(u64 at) {
  uint4 x;
  asm("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(at));
  return x;
}
DEVICE u32 load4(u64 at) {
  u32 x;
  asm("ld.global.u32 %0, [%1];" : "=r"(x) : "l"(at));
  return x;
}
DEVICE float load_float(u64 at) {
  float x;
  asm("ld.global.f32 %0, [%1];" : "=f"(x) : "l"(at));
  return x;
}
DEVICE void store4(u64 at, u32 x) { asm volatile("st.global.u32 [%0], %1;" ::"l"(at), "r"(x)); }
DEVICE void store4_if(bool on, u64 at, u32 x) {
  asm volatile("{.reg .pred on; setp.ne.b32 on, %2, 0; @on st.global.u32 [%0], %1;}" ::"l"(at), "r"(x), "r"((u32)on));
}
DEVICE void store16_if(bool on, u64 at, uint4 x) {
  asm volatile("{.reg .pred on; setp.ne.b32 on, %5, 0; @on st.global.v4.u32 [%0], {%1, %2, %3, %4};}" ::"l"(at),
               "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"((u32)on));
}
#endif

// base + index step, by one instruction. (The compiler makes four of it: it carries the product's zero upper half.)
#ifdef CUSIM
DEVICE u64 place_of(u64 base, u32 index, u32 step) { return base + (u64)index * step; }
#else
DEVICE u64 place_of(u64 base, u32 index, u32 step) {
  u64 r;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(r) : "r"(index), "r"(step), "l"(base));
  return r;
}
#endif

// Copies from global to shared memory that go on while the thread computes; wait_copies(n) waits for all but
// the last n batches. A thread may read what it copied itself.
#ifdef CUSIM
DEVICE void copy16(void* to, u64 from) { *(uint4*)to = *(const uint4*)from; }
DEVICE void copy4(void* to, u64 from) { *(u32*)to = *(const u32*)from; }
DEVICE void end_copies() {}
template <i32 N>
DEVICE void wait_copies() {}
#else
DEVICE void copy16(void* to, u64 from) {
  u32 at = (u32)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
}
DEVICE void copy4(void* to, u64 from) {
  u32 at = (u32)__cvta_generic_to_shared(to);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(at), "l"(from) : "memory");
}
DEVICE void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <i32 N>
DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
#endif

DEVICE i32 smaller(i32 a, i32 b) { return a < b ? a : b; }
DEVICE i32 larger(i32 a, i32 b) { return a > b ? a : b; }
