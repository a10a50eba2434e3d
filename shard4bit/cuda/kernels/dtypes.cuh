// Parameters and gradients in fp32, bf16 or fp16, eight at a time. Include after arith.cuh.
#pragma once

struct F32 {
  typedef float raw;
  static constexpr i32 vectors = 2;  // of 16 bytes in eight elements
};
struct BF16 {
  typedef u16 raw;
  static constexpr i32 vectors = 1;
};
struct F16 {
  typedef u16 raw;
  static constexpr i32 vectors = 1;
};

DEVICE float widen(F32, float x) { return x; }
DEVICE float widen(BF16, u16 x) { return __uint_as_float((u32)x << 16); }

DEVICE void widen2(BF16, u32 word, float* x) {
  x[0] = __uint_as_float(word << 16);
  x[1] = __uint_as_float(word & 0xffff0000u);
}
DEVICE float narrow(F32, float x) { return x; }

#ifdef CUSIM
DEVICE float widen(F16, u16 x) {
  _Float16 h;
  memcpy(&h, &x, 2);
  return (float)h;
}
DEVICE u16 narrow(BF16, float x) {
  u32 bits = __float_as_uint(x);
  if (is_nan(x)) return 0x7fff;
  return (u16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
DEVICE u16 narrow(F16, float x) {
  _Float16 h = (_Float16)x;
  u16 bits;
  memcpy(&bits, &h, 2);
  return is_nan(x) ? 0x7fff : bits;
}
DEVICE u32 narrow2(BF16 t, float low, float high) { return narrow(t, low) | (u32)narrow(t, high) << 16; }
DEVICE u32 narrow2(F16 t, float low, float high) { return narrow(t, low) | (u32)narrow(t, high) << 16; }
#else
DEVICE float widen(F16, u16 x) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x));
  return r;
}
DEVICE u16 narrow(BF16, float x) {
  u16 r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return r;
}
DEVICE u16 narrow(F16, float x) {
  u16 r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return r;
}
DEVICE u32 narrow2(BF16, float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DEVICE u32 narrow2(F16, float low, float high) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
#endif

template <class T>
DEVICE void widen2(T t, u32 word, float* x) {
  x[0] = widen(t, (u16)(word & 0xffffu));
  x[1] = widen(t, (u16)(word >> 16));
}

// Eight consecutive elements out of one vector of 16 bytes, or two.
DEVICE void unpack8(F32, const uint4* a, float* x) {
#pragma unroll
  for (i32 j = 0; j < 2; ++j) {
    x[4 * j] = __uint_as_float(a[j].x), x[4 * j + 1] = __uint_as_float(a[j].y);
    x[4 * j + 2] = __uint_as_float(a[j].z), x[4 * j + 3] = __uint_as_float(a[j].w);
  }
}

template <class T>
DEVICE void unpack8(T t, const uint4* a, float* x) {
  u32 word[4] = {a[0].x, a[0].y, a[0].z, a[0].w};
#pragma unroll
  for (i32 j = 0; j < 4; ++j) widen2(t, word[j], x + 2 * j);
}

// At a 16-byte boundary of global memory; stored only if ``on``.
template <class T>
DEVICE void load8(T t, u64 at, float* x) {
  uint4 a[T::vectors];
#pragma unroll
  for (i32 j = 0; j < T::vectors; ++j) a[j] = load16(at + 16 * j);
  unpack8(t, a, x);
}

DEVICE void store8(F32, u64 at, const float* x, bool on = true) {
#pragma unroll
  for (i32 j = 0; j < 2; ++j)
    store16_if(on, at + 16 * j,
               make_uint4(__float_as_uint(x[4 * j]), __float_as_uint(x[4 * j + 1]),
                          __float_as_uint(x[4 * j + 2]), __float_as_uint(x[4 * j + 3])));
}

template <class T>
DEVICE void store8(T t, u64 at, const float* x, bool on = true) {
  store16_if(on, at,
             make_uint4(narrow2(t, x[0], x[1]), narrow2(t, x[2], x[3]), narrow2(t, x[4], x[5]),
                        narrow2(t, x[6], x[7])));
}
