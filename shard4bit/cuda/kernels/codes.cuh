// Four-bit codes: the signed dynamic-exponent map (first moment) and the unsigned linear map without
// zero (second moment). Include after arith.cuh.
#pragma once

// Host-made tables of the signed map. A value y in [-1, 1] falls into the bin floor(63 y) (modulo 128);
// bins hold at most one midpoint, the first that is not below the bin: its number is the bin's base code. Bins
// have it times 4, which is where that midpoint is, in bytes.
struct Tables {
  float values[16];
  float mids[16];  // 15 midpoints and +Inf
  u8 bins[128];
};

#define BIN_SCALE 63.0f
#define INTEGER 12582912.0f  // 1.5 x 2^23: adding it puts an integer into the low mantissa bits

// a + 4 if y > mid, else a. (Of C the compiler makes an addition and a selection.) And a byte as it was read,
// which the compiler else masks once more.
#ifdef CUSIM
DEVICE u32 add_4_if_above(u32 a, float y, float mid) { return y > mid ? a + 4 : a; }
DEVICE u32 byte_as_read(u8 x) { return x; }
#else
DEVICE u32 byte_as_read(u8 x) {
  u32 r;
  asm("mov.b32 %0, %1;" : "=r"(r) : "r"((u32)x));
  return r;
}
DEVICE u32 add_4_if_above(u32 a, float y, float mid) {
  asm("{.reg .pred above; setp.gt.f32 above, %1, %2; @above add.u32 %0, %0, 4;}" : "+r"(a) : "f"(y), "f"(mid));
  return a;
}
#endif

// Adds the code of y at nibble k of a word.
DEVICE u32 add_signed(const Tables& t, float y, i32 k, u32 word) {
  u32 place = byte_as_read(t.bins[__float_as_uint(fma_down(y, BIN_SCALE, INTEGER)) & 127u]);
  place = add_4_if_above(place, y, *(const float*)((const u8*)t.mids + place));
  return word + (k == 0 ? place >> 2 : place << (4 * k - 2));
}

// Eight codes under one absmax. Scales that are 0 or NaN give code 0; under an infinite one finite values
// are 0/Inf (code 7) and Inf itself is NaN (code 0).
DEVICE u32 encode_signed8(const Tables& t, const float* x, float absmax, float inv) {
  u32 word = 0, bits = __float_as_uint(absmax);
  if (bits - 1u < 0x7f800000u - 1u) {  // finite and not zero
#pragma unroll
    for (i32 k = 0; k < 8; ++k) word = add_signed(t, mul(x[k], inv), k, word);
  } else if (bits == 0x7f800000u) {
#pragma unroll
    for (i32 k = 0; k < 8; ++k) word |= (magnitude(x[k]) < absmax ? 7u : 0u) << (4 * k);
  }
  return word;
}

// Eight linear codes: ceil(16 y - 1.5) for y = x inv in [0, 1], exactly; NaN gives 0. The codes are left in
// the low bits of 2^23 + code, whose exponents add up to a constant.
template <class Inverse>
DEVICE u32 encode_linear8(const float* x, Inverse inv) {
  u32 word = 0u - (0x4b000000u + (0x4b000000u << 4));
#pragma unroll
  for (i32 k = 0; k < 8; ++k) {
    float t = fma_up(mul(x[k], inv(k)), 16.0f, 8388608.0f - 1.5f);
    word += __float_as_uint(max_number(t, 8388608.0f)) << (4 * k);
  }
  return word;
}

// Stochastic rounding (maths/rounding.py): a hash for eight columns of a row (drawn_row) in a step, and from
// it a number of [1, 2) for each of them.
DEVICE u32 drawn_row(u32 step, u32 row) { return step * 0x9E3779B9u + row * 0x85EBCA6Bu; }

DEVICE u32 drawn_hash(u32 row, u32 columns) {
  u32 x = row + columns * 0xC2B2AE35u;
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// Eight linear codes: floor(16 y + draw) - 2, not below 0, for y = x inv in [0, 1 + 2^-23]; NaN gives 0.
template <class Inverse>
DEVICE u32 encode_drawn8(const float* x, Inverse inv, u32 hash) {
  u32 word = 0u - (0x4b000000u + (0x4b000000u << 4));
#pragma unroll
  for (i32 k = 0; k < 8; ++k) {
    float draw = __uint_as_float(masked_or(hash, 0x7fff00u, 0x3f800000u));
    float t = fma_down(fma_near(mul(x[k], inv(k)), 16.0f, draw), 1.0f, 8388608.0f - 2.0f);
    word += __float_as_uint(max_number(t, 8388608.0f)) << (4 * k);
    hash *= 0x915F77F5u;
  }
  return word;
}

// (code k of a word + 1) / 16, exactly, without an integer conversion.
template <i32 K>
DEVICE float linear_value(u32 word) {
  constexpr i32 k = K & 3;
  u32 half = K < 4 ? word : word >> 16;
  float t = __uint_as_float(masked_or(half, 15u << (4 * k), 0x4b000000u));  // 2^23 + code 2^(4k)
  constexpr float scale = 1.0f / (float)(16 << (4 * k));
  return fma_near(t, scale, 0.0625f - 8388608.0f * scale);
}

DEVICE void linear_values8(u32 word, float* x) {
  x[0] = linear_value<0>(word), x[1] = linear_value<1>(word), x[2] = linear_value<2>(word);
  x[3] = linear_value<3>(word), x[4] = linear_value<4>(word), x[5] = linear_value<5>(word);
  x[6] = linear_value<6>(word), x[7] = linear_value<7>(word);
}

DEVICE float signed_value(const Tables& t, u32 offset) { return *(const float*)((const u8*)t.values + offset); }

// The signed map's values of a word's codes. Offsets into the table are made four at a time.
DEVICE void signed_values8(const Tables& t, u32 word, float* x) {
  u32 even = (word << 2) & 0x3c3c3c3cu, odd = (word >> 2) & 0x3c3c3c3cu;
#pragma unroll
  for (i32 j = 0; j < 4; ++j) {
    x[2 * j] = signed_value(t, byte_of(even, j));
    x[2 * j + 1] = signed_value(t, byte_of(odd, j));
  }
}
