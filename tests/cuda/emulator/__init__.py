"""Runs CUDA C++ kernels on the CPU: the very source that NVRTC compiles, built with g++ behind cusim.h.

    module = Module(source, flags=("-DBLOCK=128",))
    kernel = module.get_function("scale")
    kernel(grid=4, block=(32, 4), args=(x, np.float32(2), np.int64(x.size)), order=DESCENDING)

Each CUDA thread of a block is a fibre, and all of them share one CPU thread. A thread is left only where it
waits: in __syncthreads, in a warp primitive, or at its end. Which one goes on is the launch's `order`; a
kernel whose results differ between orders has a race. Every order also applies to warps and to blocks.

A launch raises RuntimeError where a GPU would hang or be free to do anything: a lane or thread missing from
a warp primitive or barrier (threads that have ended count as missing), a memory fault (see `guarded`), and
with `sanitize=True` undefined behaviour such as signed overflow, an index out of a local or shared array's
bounds, a misaligned vector access or a float conversion that does not fit. The process survives all of these.

Shared memory is all ones before each block. Floats follow IEEE 754 with gradual underflow, unlike on a GPU
with -ftz=true, and a * b + c is never contracted.
"""

from tests.cuda.emulator.build import available
from tests.cuda.emulator.memory import guarded
from tests.cuda.emulator.module import ASCENDING, DESCENDING, ORDERS, SHUFFLED, Kernel, Module

__all__ = ["ASCENDING", "DESCENDING", "ORDERS", "SHUFFLED", "Kernel", "Module", "available", "guarded"]
