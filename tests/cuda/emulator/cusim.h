// CUDA C++ on the CPU: included ahead of a kernel's source, it makes g++ compile the very text that goes to
// NVRTC. Every CUDA thread of a block is a fibre on one CPU thread, and blocks run one after another.
//
// The source is put into an unnamed namespace inside of cusim_device, where the intrinsics are: they hide
// C library functions of the same name, and every function and variable is private to the module.
// CUSIM is defined, for what a kernel has to do otherwise here, such as inline PTX.
//
// Not here: dynamic shared memory, textures, cooperative groups, waiting for another block, half precision.
#pragma once
#define CUSIM 1

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "types.h"

#include "scheduler.h"

#include "warp.h"

#include "atomics.h"

#include "arithmetic.h"

#include "launch.h"

#include "undefined.h"

namespace cusim_device {
[[noreturn]] inline void __trap() {
  CUSIM_FAIL("__trap()");
  __builtin_unreachable();
}
}  // namespace cusim_device

#define threadIdx (static_cast<const uint3&>(::cusim::current->index))
#define blockIdx (static_cast<const uint3&>(::cusim::block_index))
#define blockDim (static_cast<const dim3&>(::cusim::block_size))
#define gridDim (static_cast<const dim3&>(::cusim::grid_size))
#define warpSize 32
#define __builtin_assume(condition) \
  ((condition) ? void() : CUSIM_FAIL("what the kernel assumes does not hold: %s", #condition))

#define __global__
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
// A block's threads share the variable as they share a CPU thread; launch.h poisons it. `used` keeps the
// compiler from reasoning that nothing but what it sees changes the variable.
#define __shared__ static thread_local __attribute__((used))
