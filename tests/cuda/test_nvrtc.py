"""What is read off NVRTC: registers, local arrays and spills of kernels, and the compiler's complaints."""

from __future__ import annotations

import pytest

from tests.cuda import nvrtc
from tests.cuda.test_emulator import SAMPLES

pytestmark = pytest.mark.skipif(
    not nvrtc.available(), reason="the package nvidia-cuda-nvrtc is not installed"
)

# 64 sums that are all needed at once, in a block so large that a thread has no more than 32 registers.
SPILLS = """
extern "C" __global__ void __launch_bounds__(1024, 2) spills(float* x) {
  float sum[64];
  #pragma unroll
  for (int i = 0; i < 64; ++i) sum[i] = x[i * 1024 + threadIdx.x];
  for (int k = 0; k < 100; ++k) {
    #pragma unroll
    for (int i = 0; i < 64; ++i) sum[i] = fmaf(sum[i], sum[(i + 7) % 64], x[k]);
  }
  #pragma unroll
  for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = sum[i];
}
"""
INDEXED = """
extern "C" __global__ void indexed(float* x, const int* at) {
  float local[32];
  for (int i = 0; i < 32; ++i) local[i] = x[i];
  for (int i = 0; i < 32; ++i) x[at[i]] = local[at[i + 32]];
}
extern "C" __global__ void plain(float* x) { x[threadIdx.x] *= FACTOR; }
"""


@pytest.mark.parametrize("arch", nvrtc.ARCHITECTURES)
def test_resources(arch):
    spills = nvrtc.resources(SPILLS, arch)["spills"]
    assert spills.registers <= 32 and spills.spill_bytes >= 128

    found = nvrtc.resources(INDEXED, arch, ("-DFACTOR=2.0f",))
    assert found.keys() == {"indexed", "plain"}
    assert found["indexed"].stack_bytes == 128 and found["indexed"].spill_bytes == 0
    registers, stack_bytes, spill_bytes = found["plain"]
    assert 0 < registers < 32 and stack_bytes == spill_bytes == 0


def test_complaints():
    with pytest.raises(
        RuntimeError, match=r'sm_90(?s:.*)kernel\.cu\(2\): error: identifier "missing" is undefined'
    ):
        nvrtc.resources('extern "C" __global__ void k(int* out) {\n  *out = missing;\n}', "sm_90")
    with pytest.raises(RuntimeError, match="unrecognized option -nonsense"):
        nvrtc.resources(SPILLS, "sm_90", ("-nonsense",))
    with pytest.raises(RuntimeError, match="sm_1"):
        nvrtc.resources(SPILLS, "sm_1")


def test_standard():
    source = 'static_assert(__cplusplus == EXPECTED, "");'
    assert nvrtc.resources(source, "sm_90", ("-DEXPECTED=201703",)) == {}
    assert nvrtc.resources(source, "sm_90", ("-DEXPECTED=202002", "--std=c++20")) == {}


@pytest.mark.parametrize("arch", nvrtc.ARCHITECTURES)
def test_what_the_emulator_runs_is_cuda(arch):
    assert "reverse_with_barriers" in nvrtc.resources(SAMPLES, arch)


def test_instructions():
    listing = """
.text.first:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 FFMA R4, R5, R6, R4 ;
.L_x_0:
        /*0020*/                   BRA `(.L_x_0);
        /*0030*/                   NOP;
//--------------------- .text.second            --------------------------
        /*0000*/                   EXIT ;
"""
    found = nvrtc.instructions("//----- .text.first ---\n" + listing)
    assert found == {
        "first": ["LDC R1, c[0x0][0x28]", "@!P0 FFMA R4, R5, R6, R4", "BRA `(.L_x_0)"],
        "second": ["EXIT"],
    }
