// __syncthreads and the warp primitives. Each takes the place of its call as hidden last arguments.
#pragma once
#include <cstring>
#include <type_traits>

#include "scheduler.h"

#define CUSIM_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define CUSIM_HERE (::cusim::Place{file, line})

namespace cusim {

template <class T>
uint64_t to_bits(T value) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= 8, "a warp primitive takes an arithmetic type");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void finish_nothing(Thread*, unsigned) {}

// Every lane gets the value of its source lane.
inline void finish_shuffle(Thread* lanes, unsigned mask) {
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    Thread& lane = lanes[lowest(rest)];
    if (!(mask >> lane.source & 1))
      CUSIM_FAIL("%s at %s:%d: lane %u reads lane %u, which the mask %08x leaves out", lane.operation->name,
                 lane.place.file, lane.place.line, lowest(rest), lane.source, mask);
    lane.result = lanes[lane.source].value;
  }
}

// Every lane gets the mask of the lanes whose value is not zero.
inline void finish_ballot(Thread* lanes, unsigned mask) {
  unsigned votes = 0;
  for (unsigned rest = mask; rest; rest &= rest - 1)
    votes |= unsigned(lanes[lowest(rest)].value != 0) << lowest(rest);
  for (unsigned rest = mask; rest; rest &= rest - 1) lanes[lowest(rest)].result = votes;
}

// Every lane gets all values joined.
template <class T, class Join>
void finish_reduce(Thread* lanes, unsigned mask) {
  T all = from_bits<T>(lanes[lowest(mask)].value);
  for (unsigned rest = mask & (mask - 1); rest; rest &= rest - 1)
    all = Join()(all, from_bits<T>(lanes[lowest(rest)].value));
  for (unsigned rest = mask; rest; rest &= rest - 1) lanes[lowest(rest)].result = to_bits(all);
}

inline constexpr Operation sync_warp{"__syncwarp", finish_nothing};
inline constexpr Operation shuffle{"__shfl_sync", finish_shuffle};
inline constexpr Operation shuffle_xor{"__shfl_xor_sync", finish_shuffle};
inline constexpr Operation shuffle_up{"__shfl_up_sync", finish_shuffle};
inline constexpr Operation shuffle_down{"__shfl_down_sync", finish_shuffle};
inline constexpr Operation ballot{"__ballot_sync", finish_ballot};
inline constexpr Operation any{"__any_sync", finish_ballot};
inline constexpr Operation all{"__all_sync", finish_ballot};

template <class T>
T shuffled_value(const Operation& operation, Place place, unsigned mask, T value, unsigned source,
                 int width) {
  if (width < 1 || width > 32 || (width & (width - 1)))
    CUSIM_FAIL("%s at %s:%d with width %d", operation.name, place.file, place.line, width);
  return from_bits<T>(meet(operation, place, mask, to_bits(value), source));
}

}  // namespace cusim

namespace cusim_device {

inline void __syncthreads(CUSIM_PLACE) { cusim::barrier(CUSIM_HERE); }
inline void __syncwarp(unsigned mask = ~0u, CUSIM_PLACE) {
  cusim::meet(cusim::sync_warp, CUSIM_HERE, mask, 0);
}

// A fence orders memory for other threads; here every thread sees every write at once.
inline void __threadfence_block() {}
inline void __threadfence() {}
inline void __threadfence_system() {}

// The source lane of a shuffle stays within the caller's group of `width` lanes; a lane whose source is
// outside of it keeps its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUSIM_PLACE) {
  const unsigned lane = cusim::lane_of(*cusim::current), w = width;
  const unsigned from = (lane & -w) | (source & (w - 1));
  return cusim::shuffled_value(cusim::shuffle, CUSIM_HERE, mask, value, from, width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, CUSIM_PLACE) {
  const unsigned lane = cusim::lane_of(*cusim::current), w = width, other = lane ^ lane_mask;
  const unsigned source = other < (lane & -w) + w ? other : lane;
  return cusim::shuffled_value(cusim::shuffle_xor, CUSIM_HERE, mask, value, source, width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUSIM_PLACE) {
  const unsigned lane = cusim::lane_of(*cusim::current), w = width;
  const unsigned source = (lane & (w - 1)) >= delta ? lane - delta : lane;
  return cusim::shuffled_value(cusim::shuffle_up, CUSIM_HERE, mask, value, source, width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUSIM_PLACE) {
  const unsigned lane = cusim::lane_of(*cusim::current), w = width;
  const unsigned source = delta < w - (lane & (w - 1)) ? lane + delta : lane;
  return cusim::shuffled_value(cusim::shuffle_down, CUSIM_HERE, mask, value, source, width);
}

inline unsigned __ballot_sync(unsigned mask, int vote, CUSIM_PLACE) {
  return unsigned(cusim::meet(cusim::ballot, CUSIM_HERE, mask, vote != 0));
}
inline int __any_sync(unsigned mask, int vote, CUSIM_PLACE) {
  return cusim::meet(cusim::any, CUSIM_HERE, mask, vote != 0) != 0;
}
inline int __all_sync(unsigned mask, int vote, CUSIM_PLACE) {
  return cusim::meet(cusim::all, CUSIM_HERE, mask, vote != 0) == mask;
}

// __reduce_*_sync, which sm_80 and later have for 32-bit integers.
#define CUSIM_REDUCE(name, type, expression)                                                        \
  inline type __reduce_##name##_sync(unsigned mask, type value, CUSIM_PLACE) {                      \
    struct Join {                                                                                   \
      type operator()(type a, type b) { return expression; }                                        \
    };                                                                                              \
    constexpr auto finish = cusim::finish_reduce<type, Join>;                                       \
    static constexpr cusim::Operation operation{"__reduce_" #name "_sync", finish};                 \
    return cusim::from_bits<type>(cusim::meet(operation, CUSIM_HERE, mask, cusim::to_bits(value))); \
  }
CUSIM_REDUCE(max, unsigned, a > b ? a : b)
CUSIM_REDUCE(max, int, a > b ? a : b)
CUSIM_REDUCE(min, unsigned, a < b ? a : b)
CUSIM_REDUCE(min, int, a < b ? a : b)
CUSIM_REDUCE(add, unsigned, a + b)
CUSIM_REDUCE(add, int, int(unsigned(a) + unsigned(b)))
CUSIM_REDUCE(and, unsigned, a & b)
CUSIM_REDUCE(or, unsigned, a | b)
CUSIM_REDUCE(xor, unsigned, a ^ b)
#undef CUSIM_REDUCE

}  // namespace cusim_device
