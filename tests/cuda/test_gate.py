"""What the kernels may cost: no configuration spills, keeps arrays in local memory, or needs more registers
than leave room for its thread blocks."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from shard4bit.cuda.plan import CHUNK_ARGUMENTS
from shard4bit.cuda.source import Config, receive_text, scalars_text, vectors_text
from tests.cuda import nvrtc
from tests.cuda.test_nvrtc import INDEXED, SPILLS

pytestmark = pytest.mark.skipif(
    not nvrtc.available(), reason="the package nvidia-cuda-nvrtc is not installed"
)

MIXES = [
    ("F32", "F32"),
    ("F32", "BF16"),
    ("F32", "F16"),
    ("BF16", "BF16"),
    ("F16", "F16"),
    ("BF16", "F32"),
    ("F16", "F32"),
]
KINDS = [("ADAMW", "RANK1"), ("ADAMW", "BLOCKED"), ("ADAMW", "FACTORED"), ("SGD", "NONE")]
CONFIGS = [Config(*mix, *kind) for mix in MIXES for kind in KINDS]
USUAL = [c for c in CONFIGS if c.param == c.grad != "F16"]
# 65536 registers for 4 blocks of 256 threads, or for 3.
FOUR_BLOCKS, THREE_BLOCKS, VECTORS = 64, 80, 48
SHARED_BYTES = 48 << 10  # static shared memory of a block, at most


def names(config: Config) -> str:
    return "-".join([config.param, config.grad, config.rule, config.second])


def budgets(config: Config, arch: str) -> dict[str, int]:
    """Registers that a thread may have, by kernel."""
    apply, measure = FOUR_BLOCKS, FOUR_BLOCKS
    if config.second == "BLOCKED" and arch == "sm_100" and "F32" in (config.param, config.grad):
        apply = THREE_BLOCKS
    if config.second == "RANK1":
        if "F32" in (config.param, config.grad):
            apply = THREE_BLOCKS
        if arch == "sm_100":
            measure = THREE_BLOCKS
    return {"apply": apply, "measure": measure}


def violations(source: str, arch: str, allowed: dict[str, int]) -> list[str]:
    """What a compiled source does beyond its budgets; it must have just these kernels."""
    found = nvrtc.resources(source, arch)
    out = [] if found.keys() == allowed.keys() else [f"kernels {sorted(found)}"]
    for name, used in found.items():
        if used.spill_bytes or used.stack_bytes:
            out.append(f"{name}: {used.spill_bytes} bytes of spills, {used.stack_bytes} of stack")
        if used.registers > allowed.get(name, 0):
            out.append(f"{name}: {used.registers} registers")
    for shared in re.findall(r"(\d+) bytes smem", nvrtc.compile_source(source, arch, ())[1]):
        if int(shared) > SHARED_BYTES:
            out.append(f"{shared} bytes of shared memory")
    return out


def check(configs: list[Config], arch: str) -> None:
    with ThreadPoolExecutor(max_workers=2) as pool:  # NVRTC compiles side by side
        found = pool.map(lambda c: violations(c.text, arch, budgets(c, arch)), configs)
        assert not {names(c): bad for c, bad in zip(configs, found, strict=True) if bad}


def test_every_configuration() -> None:
    check(CONFIGS, "sm_90")


@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
def test_usual_configurations_on_other_gpus(arch: str) -> None:
    check(USUAL, arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
def test_other_configurations_on_other_gpus(arch: str) -> None:
    check([c for c in CONFIGS if c not in USUAL], arch)


@pytest.mark.parametrize("arch", nvrtc.ARCHITECTURES)
def test_vectors(arch: str) -> None:
    kernels = ("agree", "commit", "gather_sums", "total", "advance_means")
    assert violations(vectors_text(), arch, dict.fromkeys(kernels, VECTORS)) == []


@pytest.mark.parametrize("arch", nvrtc.ARCHITECTURES)
def test_scalars(arch: str) -> None:
    kernels = ("adamw_scalars", "sgd_scalars", "count_steps")
    assert violations(scalars_text(), arch, dict.fromkeys(kernels, VECTORS)) == []


@pytest.mark.parametrize("arch", nvrtc.ARCHITECTURES)
@pytest.mark.parametrize("room", [4096, 32764])
def test_receive(room: int, arch: str) -> None:
    """Both sizes that arguments may have; a table is read from where they lie, not copied to a stack."""
    text = receive_text((room - CHUNK_ARGUMENTS) // 4 * 4)
    assert violations(text, arch, {"receive": 16, "clear": 16}) == []


def test_the_gate_can_fail() -> None:
    assert any("of spills" in v for v in violations(SPILLS, "sm_90", {"spills": 64}))
    indexed = "#define FACTOR 2.0f\n" + INDEXED
    assert violations(indexed, "sm_90", {"indexed": 64, "plain": 64}) == [
        "indexed: 0 bytes of spills, 128 of stack"
    ]
    plain = 'extern "C" __global__ void plain(float* x) { x[threadIdx.x] *= 2.0f; }'
    assert violations(plain, "sm_90", {"plain": 64}) == []
    assert violations(plain, "sm_90", {"plain": 1})[0].endswith("registers")
    assert violations(plain, "sm_90", {"other": 64})[0] == "kernels ['plain']"
    shared = """extern "C" __global__ void plain(float* x) {
      __shared__ float line[12300];
      line[threadIdx.x] = x[threadIdx.x];
      __syncthreads();
      x[threadIdx.x] = line[12299 - threadIdx.x];
    }"""
    with pytest.raises(RuntimeError, match="shared"):  # the assembler's own limit
        violations(shared, "sm_90", {"plain": 64})
