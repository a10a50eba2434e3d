// CUDA's built-in vector types, with CUDA's alignment, and their make_ functions.
#pragma once

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

#define CUSIM_VECTOR2(name, element, alignment)                      \
  struct alignas(alignment) name {                                   \
    element x, y;                                                    \
  };                                                                 \
  inline name make_##name(element x, element y) { return {x, y}; }
#define CUSIM_VECTOR4(name, element, alignment)                                                  \
  struct alignas(alignment) name {                                                               \
    element x, y, z, w;                                                                          \
  };                                                                                             \
  inline name make_##name(element x, element y, element z, element w) { return {x, y, z, w}; }

inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
CUSIM_VECTOR2(uchar2, unsigned char, 2)
CUSIM_VECTOR4(uchar4, unsigned char, 4)
CUSIM_VECTOR2(ushort2, unsigned short, 4)
CUSIM_VECTOR4(ushort4, unsigned short, 8)
CUSIM_VECTOR2(short2, short, 4)
CUSIM_VECTOR4(short4, short, 8)
CUSIM_VECTOR2(int2, int, 8)
CUSIM_VECTOR4(int4, int, 16)
CUSIM_VECTOR2(uint2, unsigned, 8)
CUSIM_VECTOR4(uint4, unsigned, 16)
CUSIM_VECTOR2(float2, float, 8)
CUSIM_VECTOR4(float4, float, 16)
CUSIM_VECTOR2(longlong2, long long, 16)
CUSIM_VECTOR2(ulonglong2, unsigned long long, 16)
CUSIM_VECTOR2(double2, double, 16)

#undef CUSIM_VECTOR2
#undef CUSIM_VECTOR4
