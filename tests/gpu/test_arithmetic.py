"""The unchecked root and quotient of arith.cuh against the processor's correctly rounded ones, on a GPU."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

SOURCE = """
DEVICE u32 mix(u32 x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}
DEVICE float between(u32 bits, i32 low, i32 high) {  // any mantissa, exponent in [low, high)
  u32 exponent = 127 + low + (i32)(mix(bits ^ 0x9e3779b9u) % (u32)(high - low));
  return __uint_as_float(exponent << 23 | (bits & 0x7fffffu));
}
extern "C" __global__ void roots(u32 first, u32 last, u64* wrong) {
  for (u64 i = first + blockIdx.x * 256ull + threadIdx.x; i <= last; i += gridDim.x * 256ull) {
    float x = __uint_as_float((u32)i);
    if (__float_as_uint(root_in_range(x)) != __float_as_uint(root(x))) atomicAdd(wrong, 1ull);
  }
}
extern "C" __global__ void quotients(u32 seed, u64 count, u64* wrong) {
  for (u64 i = blockIdx.x * 256ull + threadIdx.x; i < count; i += gridDim.x * 256ull) {
    u32 h = mix((u32)i ^ seed), k = mix(h + (u32)(i >> 32) * 0x85ebca6bu + 1u);
    float a = between(h, -80, 40), b = between(k, -50, 35);
    if (i & 1) a = -a;
    if (i % 3 == 0) b = __uint_as_float((__float_as_uint(b) & 0xff800000u) | (0x7fffffu - (k & 7u)));
    if (__float_as_uint(divide_in_range(a, b)) != __float_as_uint(divide(a, b))) atomicAdd(wrong, 1ull);
  }
}
// Divisors of [1, 2) whose reciprocal is not the rounded one, into ``found``.
extern "C" __global__ void reciprocals(u32* found, u64* wrong) {
  for (u32 i = blockIdx.x * 256u + threadIdx.x; i < 0x800000u; i += gridDim.x * 256u) {
    float b = __uint_as_float(0x3f800000u + i);
    if (__float_as_uint(reciprocal_in_range(b)) != __float_as_uint(divide(1.0f, b)))
      found[atomicAdd(wrong, 1ull) % 64] = 0x3f800000u + i;
  }
}
// Quotients of every mantissa by one.
extern "C" __global__ void all_by(u32 divisor, i32 a_exponent, i32 b_exponent, u64* wrong) {
  float b = __uint_as_float(divisor + ((u32)b_exponent << 23));
  for (u32 i = blockIdx.x * 256u + threadIdx.x; i < 0x800000u; i += gridDim.x * 256u) {
    float a = __uint_as_float((u32)(127 + a_exponent) << 23 | i);
    if (__float_as_uint(divide_in_range(a, b)) != __float_as_uint(divide(a, b))) atomicAdd(wrong, 1ull);
  }
}
"""
DIFFICULT = (0x3FFFFFFD, 0x3FFFFFFF)  # for some guesses of the hardware, a quotient would be wrong


def run(name: str, *args: object) -> int:
    import cupy

    header = (files("shard4bit.cuda") / "kernels" / "arith.cuh").read_text()
    module = cupy.RawModule(code=header.replace("#pragma once\n", "") + SOURCE, options=("-std=c++17",))
    wrong = torch.zeros(1, dtype=torch.int64, device="cuda")
    module.get_function(name)((4096,), (256,), (*args, wrong.data_ptr()))
    torch.cuda.synchronize()
    return int(wrong.item())


def test_every_quotient_that_a_reciprocal_could_spoil() -> None:
    """Where the reciprocal is rounded correctly, the quotient is (Markstein's theorem): see all others."""
    found = torch.zeros(64, dtype=torch.int32, device="cuda")
    count = run("reciprocals", found.data_ptr())
    assert count < 64
    for divisor in {*DIFFICULT, *found[:count].tolist()}:
        for exponents in ((0, 0), (-80, -50), (39, 34), (-80, 34), (39, -50)):
            wrong = run("all_by", np.uint32(divisor), *map(np.int32, exponents))
            assert wrong == 0, (hex(divisor), exponents)


def test_every_root_in_range() -> None:
    low, high = (int(np.float32(2.0**e).view(np.uint32)) for e in (-100, 40))
    assert run("roots", np.uint32(low), np.uint32(high)) == 0


def test_many_quotients_in_range() -> None:
    """Eight billion pairs."""
    for seed in range(4):
        assert run("quotients", np.uint32(12345 + seed), np.uint64(2_000_000_000)) == 0
