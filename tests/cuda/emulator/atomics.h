// Atomic operations. Threads are left only where they wait, so plain reads and writes are atomic here.
// Only the types that CUDA's own overloads take are let through.
#pragma once
#include <type_traits>

namespace cusim {

template <class T, class... Allowed>
inline constexpr bool one_of = (std::is_same_v<T, Allowed> || ...);

template <class T>
struct same {  // keeps an argument out of the deduction of T, so that it converts as in CUDA
  using type = T;
};

}  // namespace cusim

namespace cusim_device {

// The words of 32 and 64 bits that integer atomics work on.
#define CUSIM_WORDS int, unsigned, unsigned long long
#define CUSIM_ATOMIC(name, expression, ...)                                               \
  template <class T>                                                                      \
  T name(T* address, typename cusim::same<T>::type value) {                               \
    static_assert(cusim::one_of<T, __VA_ARGS__>, "CUDA has no " #name " for this type");  \
    const T old = *address;                                                               \
    *address = T(expression);                                                             \
    return old;                                                                           \
  }                                                                                       \
  template <class T>                                                                      \
  T name##_block(T* address, typename cusim::same<T>::type value) {                       \
    return name(address, value);                                                          \
  }

namespace cusim_atomic {
// A sum that wraps around, for integers as for CUDA's atomicAdd.
template <class T>
T sum(T a, T b) {
  if constexpr (std::is_floating_point_v<T>)
    return a + b;
  else
    return T(std::make_unsigned_t<T>(a) + std::make_unsigned_t<T>(b));
}
}  // namespace cusim_atomic

CUSIM_ATOMIC(atomicAdd, cusim_atomic::sum(old, value), CUSIM_WORDS, float, double)
CUSIM_ATOMIC(atomicSub, cusim_atomic::sum(old, T(0u - unsigned(value))), int, unsigned)
CUSIM_ATOMIC(atomicMax, old > value ? old : value, CUSIM_WORDS, long long)
CUSIM_ATOMIC(atomicMin, old < value ? old : value, CUSIM_WORDS, long long)
CUSIM_ATOMIC(atomicAnd, old & value, CUSIM_WORDS)
CUSIM_ATOMIC(atomicOr, old | value, CUSIM_WORDS)
CUSIM_ATOMIC(atomicXor, old ^ value, CUSIM_WORDS)
CUSIM_ATOMIC(atomicExch, value, CUSIM_WORDS, float)
#undef CUSIM_ATOMIC

template <class T>
T atomicCAS(T* address, typename cusim::same<T>::type expected, typename cusim::same<T>::type value) {
  static_assert(cusim::one_of<T, CUSIM_WORDS, unsigned short>, "CUDA has no atomicCAS for this type");
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}
#undef CUSIM_WORDS

}  // namespace cusim_device
