"""The emulator itself: threads that wait, the orders they run in, and how wrong kernels are reported."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.cuda.emulator import ASCENDING, DESCENDING, ORDERS, SHUFFLED, Module, available, build

SAMPLES = Path(__file__).with_name("samples.cu").read_text()
FULL = 2**32 - 1

pytestmark = pytest.mark.skipif(not available(), reason="there is no C++ compiler")


@pytest.fixture(scope="module")
def module():
    return Module(SAMPLES)


@pytest.fixture(scope="module", params=["assembler", "ucontext"])
def either(request):
    """Both ways to switch between fibres."""
    return Module(SAMPLES, ("-DCUSIM_UCONTEXT",) if request.param == "ucontext" else ())


def line_of(text):
    """Return where a piece of the sample kernels is, as messages put it."""
    return f"kernel.cu:{1 + SAMPLES[: SAMPLES.index(text)].count(chr(10))}"


# ---- launches and their arguments ----


def test_arguments_and_indices(module):
    class Span(ctypes.Structure):
        _fields_ = [("data", ctypes.c_void_p), ("first", ctypes.c_int), ("count", ctypes.c_int)]

    out = np.zeros(10, np.int32)
    span = Span(out.ctypes.data, 2, 7)
    module.get_function("fill")(2, 4, (span, np.float32(10), 100, np.bool_(True)))
    assert out.tolist() == [0, 0, *(3 * i + 101 + [5, 10, 20, 40][i % 4] for i in range(7)), 0]

    thread, block = np.zeros((48, 3), np.uint32), np.zeros((48, 3), np.uint32)
    sizes = np.zeros(3, np.uint32)
    module.get_function("indices")((2, 1, 2), (2, 3, 2), (thread, block.ctypes.data, sizes))
    assert sizes.tolist() == [2, 2, 32]
    assert len({(*t, *b) for t, b in zip(thread.tolist(), block.tolist(), strict=True)}) == 48
    assert thread[7].tolist() == [1, 0, 1] and block[-1].tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "0 arguments for 3 parameters"),
        ((np.zeros(1, np.int32), np.int32(1), 1), "argument 2 is i of 8 bytes, its parameter is i of 4"),
        ((np.zeros(1, np.int32), np.float32(1), np.int32(1)), "argument 1 is f of 4 bytes"),
        ((1.0, np.int32(1), np.int32(1)), "argument 0 is f of 8 bytes, its parameter is p"),
    ],
)
def test_arguments_must_fit(module, args, message):
    with pytest.raises(RuntimeError, match=message):
        module.get_function("add")(1, 1, args)


def test_sizes_must_fit(module):
    kernel = module.get_function("add")
    args = (np.zeros(1, np.int32), np.int32(1), np.int32(1))
    for grid, block in ((0, 1), (1, 0), (1, 1025), (1, (64, 32)), (1, (1, 1, 65)), ((1, 65536), 1)):
        with pytest.raises(RuntimeError):
            kernel(grid, block, args)
    with pytest.raises(TypeError):
        kernel(1, 1, (None, np.int32(1), np.int32(1)))


def test_building():
    with pytest.raises(RuntimeError, match=r"kernel\.cu:2:.*missing"):
        Module('extern "C" __global__ void k(int* out) {\n  *out = missing;\n}')
    with pytest.raises(RuntimeError, match="no kernel named nothing"):
        Module(SAMPLES).get_function("nothing")
    out = np.zeros(1, np.int32)
    Module(SAMPLES, ("-DNAME=another",)).get_function("another")(1, 1, (out,))
    assert out[0] == 7
    before = build.shared_object(SAMPLES, (), False).stat().st_mtime_ns
    build.shared_object.cache_clear()  # as in another process
    assert build.shared_object(SAMPLES, (), False).stat().st_mtime_ns == before


def test_launches_from_two_threads(module):
    results = [np.zeros(3 * 64, np.int32) for _ in range(4)]
    kernel = module.get_function("reverse_with_barriers")
    workers = [threading.Thread(target=kernel, args=(1, 64, (out,))) for out in results]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(out.tolist() == results[0].tolist() for out in results) and results[0][0] == 63


# ---- threads that wait for each other ----


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("width", [32, 8])
@pytest.mark.parametrize("operand", [0, 1, 5, 20])
def test_shuffles(either, order, width, operand):
    values, out = np.arange(100, 132, dtype=np.int32), np.zeros((4, 32), np.int32)
    either.get_function("shuffles")(1, 32, (values, out, np.int32(width), np.int32(operand)), order=order)
    for lane in range(32):
        first = lane - lane % width
        up = lane - operand if lane - operand >= first else lane
        down = lane + operand if lane + operand < first + width else lane
        across = lane ^ operand if lane ^ operand < first + width else lane
        sources = [first + operand % width, across, up, down]
        assert out[:, lane].tolist() == [100 + source for source in sources]


@pytest.mark.parametrize("order", ORDERS)
def test_halves_of_a_warp_go_their_own_ways(either, order):
    values = np.random.default_rng(0).integers(0, 1000, 32).astype(np.uint32)
    values[16:] |= 1
    out = np.zeros((4, 32), np.uint32)
    either.get_function("halves")(1, 32, (values, out), order=order)
    for half, times in ((slice(0, 16), 3), (slice(16, 32), 5)):
        odd = [i for i in range(half.start, half.stop) if values[i] & 1]
        top = int(values[half].max())
        assert set(out[0, half].tolist()) == {sum(top + k + 16 for k in range(times))}
        assert set(out[1, half].tolist()) == {sum(1 << i for i in odd)}
        assert set(out[2, half].tolist()) == {2 * bool(odd) + (len(odd) == 16)}
        assert set(out[3, half].tolist()) == {FULL + 1 - top}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("block", [1, 33, 100, 1024])
def test_barriers(either, order, block):
    out = np.zeros((2, 3, block), np.int32)
    either.get_function("reverse_with_barriers")(2, block, (out,), order=order, seed=block)
    expected = np.arange(block)[::-1] * np.array([[1], [2], [3]])
    assert (out == expected).all()


def test_a_race_shows_between_orders(module):
    results = []
    for order in ORDERS:
        out = np.zeros((3, 64), np.int32)
        module.get_function("reverse_with_race")(1, 64, (out,), order=order)
        results.append(out.tolist())
    assert results[0] != results[1] != results[2] != results[0]


def test_orders(module):
    def turns(**how):
        log, count = np.zeros(4 * 48, np.uint32), np.zeros(1, np.uint32)
        module.get_function("turns")(4, 48, (log, count), **how)
        assert sorted(log.tolist()) == list(range(4 * 48))
        return log.tolist()

    assert turns(order=ASCENDING) == list(range(4 * 48))
    assert turns(order=DESCENDING) == list(range(4 * 48))[::-1]
    assert turns(order=SHUFFLED, seed=3) == turns(order=SHUFFLED, seed=3)
    firsts = {tuple(t // 48 for t in turns(order=SHUFFLED, seed=seed)[::48]) for seed in range(20)}
    assert len(firsts) > 10  # of 24 orders of the blocks
    first = turns(order=SHUFFLED, seed=3)[:20]
    assert {t % 48 // 32 for t in first} == {0, 1}  # the warps take turns


@pytest.mark.parametrize("order", ORDERS)
def test_shared_memory_is_poisoned_for_each_block(module, order):
    out = np.zeros((3, 4), np.uint32)
    module.get_function("look_at_shared")(3, 1, (out,), order=order)
    assert out.tolist() == [[FULL, 5, FULL, 5]] * 3


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("kernel", "threads", "place", "parts"),
    [
        ("missing_lane", 32, "__shfl_xor_sync(0xffffffffu, 1, 1)", ["55555555 wait", "aaaaaaaa have ended"]),
        ("missing_thread", 64, "__syncthreads();\n  out[", ["63 of 64", "warp 1:", "00000100 have ended"]),
        ("two_barriers", 64, "__syncthreads();\n  else", [line_of("__syncthreads(), out"), "while"]),
        ("two_primitives", 32, "? __ballot_sync", ["__ballot_sync at", "__reduce_max_sync at", "while lane"]),
        ("two_places", 32, "__ballot_sync(0xffffffffu, 0)", [line_of("__ballot_sync(0xffffffffu, 1);")]),
        (
            "two_masks",
            32,
            "__ballot_sync(mask, 1);\n}",
            ["7fffffff wait", "80000000 wait", "(mask c0000000)"],
        ),
        ("mask_without_caller", 32, "__shfl_sync(0xfffffffeu", ["leaves out the calling lane 0"]),
        ("shuffle_from_outside", 32, "__shfl_sync(0x0000ffffu", ["reads lane 20"]),
    ],
)
def test_threads_that_wait_in_vain(either, kernel, threads, place, parts, order):
    out = np.zeros(64, np.uint32)
    with pytest.raises(RuntimeError) as error:
        either.get_function(kernel)((1, 2), threads, (out,), order=order)
    message = str(error.value)
    block = {ASCENDING: "block (0,0,0)", DESCENDING: "block (0,1,0)", SHUFFLED: "block (0,"}[order]
    for part in (f"kernel {kernel}, {block}", line_of(place), *parts):
        assert part in message, message
