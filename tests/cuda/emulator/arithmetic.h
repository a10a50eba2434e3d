// Arithmetic, bit and conversion intrinsics, loads and stores with cache hints. Everything rounds as
// IEEE 754 has it and nothing is flushed to zero. The approximate intrinsics (__expf, rsqrtf, ...) have
// no bits to agree on and are left out.
#pragma once
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace cusim {

template <class To, class From>
To reinterpret(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

// An fma in another rounding mode. The volatile variables keep the compiler from computing it at
// compile time, and before or after the mode is the one wanted.
__attribute__((noinline)) inline float fma_in_mode(int mode, float a, float b, float c) {
  const int before = std::fegetround();
  volatile float x = a, y = b, z = c;
  std::fesetround(mode);
  volatile float result = std::fma(float(x), float(y), float(z));
  std::fesetround(before);
  return result;
}

#if defined(__x86_64__) && !defined(CUSIM_PORTABLE_FMA)
// The same in three instructions, where the CPU has an fma: the function above takes far longer.
// `mode` is the field of the control register: 1 is toward -inf, 2 toward +inf.
inline float fma_in_register_mode(unsigned mode, float a, float b, float c) {
  const unsigned before = __builtin_ia32_stmxcsr(), during = (before & ~0x6000u) | mode << 13;
  asm volatile("ldmxcsr %[during]\n\tvfmadd213ss %[c], %[b], %[a]\n\tldmxcsr %[before]"
               : [a] "+x"(a)
               : [b] "x"(b), [c] "x"(c), [during] "m"(during), [before] "m"(before));
  return a;
}
inline const bool has_fma = (__builtin_cpu_init(), __builtin_cpu_supports("fma"));
#else
inline float fma_in_register_mode(unsigned, float, float, float) { return 0; }
inline constexpr bool has_fma = false;
#endif

// A float as the nearest integer type's value: NaN is 0, what does not fit is the nearest that does.
template <class T, class F>
T saturate(F value) {
  if (value != value) return 0;
  if (value <= F(std::numeric_limits<T>::min())) return std::numeric_limits<T>::min();
  if (value >= F(std::numeric_limits<T>::max())) return std::numeric_limits<T>::max();
  return T(value);
}

template <class F>
F larger(F a, F b) {  // as PTX's max: a number beats a NaN, and +0 is above -0
  if (a != a) return b != b ? reinterpret<float>(0x7fffffffu) : b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}
template <class F>
F smaller(F a, F b) {
  if (a != a) return b != b ? reinterpret<float>(0x7fffffffu) : b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) ? a : b;
  return a < b ? a : b;
}

}  // namespace cusim

namespace cusim_device {

// a * b + c rounded once, toward -inf and toward +inf. For a kernel's #ifdef CUSIM.
inline float cusim_fma_rd(float a, float b, float c) {
  return cusim::has_fma ? cusim::fma_in_register_mode(1, a, b, c) : cusim::fma_in_mode(FE_DOWNWARD, a, b, c);
}
inline float cusim_fma_ru(float a, float b, float c) {
  return cusim::has_fma ? cusim::fma_in_register_mode(2, a, b, c) : cusim::fma_in_mode(FE_UPWARD, a, b, c);
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }

// These hide the C library's, which leave open which zero or NaN comes out.
inline float fmaxf(float a, float b) { return cusim::larger(a, b); }
inline float fminf(float a, float b) { return cusim::smaller(a, b); }
inline float fmax(float a, float b) { return cusim::larger(a, b); }
inline float fmin(float a, float b) { return cusim::smaller(a, b); }
inline double fmax(double a, double b) { return cusim::larger(a, b); }
inline double fmin(double a, double b) { return cusim::smaller(a, b); }

template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
  using C = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<C>)
    return cusim::larger(C(a), C(b));
  else
    return C(a) < C(b) ? C(b) : C(a);
}
template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
  using C = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<C>)
    return cusim::smaller(C(a), C(b));
  else
    return C(b) < C(a) ? C(b) : C(a);
}
inline float __saturatef(float a) { return a >= 0 ? min(a, 1.0f) : 0.0f; }

inline int __float_as_int(float a) { return cusim::reinterpret<int>(a); }
inline unsigned __float_as_uint(float a) { return cusim::reinterpret<unsigned>(a); }
inline float __int_as_float(int a) { return cusim::reinterpret<float>(a); }
inline float __uint_as_float(unsigned a) { return cusim::reinterpret<float>(a); }
inline long long __double_as_longlong(double a) { return cusim::reinterpret<long long>(a); }
inline double __longlong_as_double(long long a) { return cusim::reinterpret<double>(a); }

// Conversions; to integers they saturate, and NaN becomes 0, as on a GPU.
inline int __float2int_rn(float a) { return cusim::saturate<int>(std::nearbyint(a)); }
inline int __float2int_rz(float a) { return cusim::saturate<int>(std::trunc(a)); }
inline int __float2int_rd(float a) { return cusim::saturate<int>(std::floor(a)); }
inline int __float2int_ru(float a) { return cusim::saturate<int>(std::ceil(a)); }
inline unsigned __float2uint_rn(float a) { return cusim::saturate<unsigned>(std::nearbyint(a)); }
inline unsigned __float2uint_rz(float a) { return cusim::saturate<unsigned>(std::trunc(a)); }
inline unsigned __float2uint_rd(float a) { return cusim::saturate<unsigned>(std::floor(a)); }
inline unsigned __float2uint_ru(float a) { return cusim::saturate<unsigned>(std::ceil(a)); }
inline float __int2float_rn(int a) { return float(a); }
inline float __uint2float_rn(unsigned a) { return float(a); }
inline float __ll2float_rn(long long a) { return float(a); }
inline float __ull2float_rn(unsigned long long a) { return float(a); }
inline float __double2float_rn(double a) { return float(a); }

inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __ffsll(long long a) { return __builtin_ffsll(a); }
inline int __clz(int a) { return a ? __builtin_clz(unsigned(a)) : 32; }
inline int __clzll(long long a) { return a ? __builtin_clzll((unsigned long long)a) : 64; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)a * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline unsigned __brev(unsigned a) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (a >> bit & 1) << (31 - bit);
  return reversed;
}
// Four bytes out of the eight of (b, a), each chosen by four bits of the selector: its upper bit asks for
// the byte's sign, eight times.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long bytes = (unsigned long long)b << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned which = selector >> (4 * i);
    unsigned byte = unsigned(bytes >> (8 * (which & 7))) & 0xff;
    if (which & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return unsigned((((unsigned long long)high << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned(((unsigned long long)high << 32 | low) >> (shift & 31));
}

// Cache hints change nothing here.
#define CUSIM_LOAD(name) \
  template <class T>     \
  T name(const T* from) { \
    return *from;        \
  }
#define CUSIM_STORE(name)                                              \
  template <class T>                                                   \
  void name(T* to, typename cusim::same<T>::type value) { *to = value; }
CUSIM_LOAD(__ldg)
CUSIM_LOAD(__ldca)
CUSIM_LOAD(__ldcg)
CUSIM_LOAD(__ldcs)
CUSIM_LOAD(__ldcv)
CUSIM_LOAD(__ldlu)
CUSIM_STORE(__stwb)
CUSIM_STORE(__stcg)
CUSIM_STORE(__stcs)
CUSIM_STORE(__stwt)
#undef CUSIM_LOAD
#undef CUSIM_STORE

}  // namespace cusim_device
