"""The emulator's arithmetic, and what it reports of faults and undefined behaviour."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from tests.cuda.emulator import ORDERS, Module, available, guarded
from tests.cuda.test_emulator import SAMPLES, line_of

F32 = np.float32
INT_MAX = np.int32(2**31 - 1)

pytestmark = pytest.mark.skipif(not available(), reason="there is no C++ compiler")


@pytest.fixture(scope="module")
def module():
    return Module(SAMPLES)


@pytest.fixture(scope="module")
def checked():
    return Module(SAMPLES, sanitize=True)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "sanitized"])
def either(request):
    return Module(SAMPLES, sanitize=request.param)


# ---- arithmetic ----


@pytest.mark.parametrize("order", ORDERS)
def test_atomics(module, order):
    i, u = np.zeros(6, np.int32), np.zeros(6, np.uint32)
    wide, f = np.zeros(3, np.uint64), np.zeros(2, F32)
    u[2:5] = 99, 0, 2**32 - 1
    module.get_function("atomics")(1, 32, (i, u, wide, f), order=order)
    assert i[:3].tolist() == [496, 31, -31] and 0 <= i[3] < 32 and i[4:].tolist() == [-32, 1]
    assert u.tolist() == [32, 31, 0, 2**32 - 1, 0, 9]
    assert wide.tolist() == [32 << 40, 31 << 40, 2**32 - 1] and f.tolist() == [16, 2]


def test_minimum_maximum_and_conversion(module):
    tiny = F32(1e-45)
    a = np.array([1, np.nan, 2, 0.0, -0.0, tiny, np.inf, -3e9, 2.5], F32)
    b = np.array([3, 4, np.nan, -0.0, 0.0, 0.0, -np.inf, 5, 1], F32)
    out = np.zeros((6, a.size), F32)
    module.get_function("arithmetic")(1, 32, (a, b, out, np.int32(a.size)))
    top = np.array([3, 4, 2, 0.0, 0.0, tiny, np.inf, 5, 2.5], F32)
    low = np.array([1, 4, 2, -0.0, -0.0, 0.0, -np.inf, -3e9, 1], F32)
    assert out[0].tobytes() == out[2].tobytes() == top.tobytes() and out[1].tobytes() == low.tobytes()
    integers = [1, 0, 2, 0, 0, 0, 2**31 - 1, -(2**31), 2]
    assert out[4].view(np.int32).tolist() == integers


def test_floats_are_neither_flushed_nor_contracted(module):
    bits = np.random.default_rng(1).integers(0, 2**32, (2, 4096), dtype=np.uint32)
    bits[0, :2048] &= 0x807FFFFF  # subnormal
    a, b = bits.view(F32)
    out = np.zeros((6, a.size), F32)
    module.get_function("arithmetic")(a.size // 128, 128, (a, b, out, np.int32(a.size)))
    with np.errstate(all="ignore"):
        assert np.array_equal(out[3], a * F32(0.5), equal_nan=True)
        assert np.array_equal(out[5], a * b + F32(1), equal_nan=True)
    assert (out[3][:2048] != 0).sum() > 2040


def test_bits(module):
    a, b = 0x80F01234, 0x56789ABC
    out = np.zeros(12, np.uint32)
    module.get_function("bits")(1, 1, (np.uint32(a), np.uint32(b), out))
    assert out[:4].tolist() == [10, 3, 0, int(f"{a:032b}"[::-1], 2)]
    assert out[4:6].tolist() == [0x56129AF0, 0x343434FF]
    assert out[6:9].tolist() == [0x789ABC80, 0xBC80F012, a * b >> 32]
    assert out[9:].tolist() == [a, 9, 32]


def round_down(value):
    """Return the largest float32 that is not above an exact number."""
    top = float(np.finfo(F32).max)
    near = F32(min(max(float(value), -top), top))
    with np.errstate(over="ignore"):
        around = [np.nextafter(near, F32(-np.inf)), near, np.nextafter(near, F32(np.inf))]
    finite = [x for x in around if np.isfinite(x) and Fraction(float(x)) <= value]
    return max(finite, default=F32(-np.inf))


def awkward_triples():
    """Triples of floats: special ones in all combinations; random ones that cancel, overflow or underflow."""
    random, many = np.random.default_rng(7), 3000
    special = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        1e-45,
        -1e-45,
        1.1754944e-38,
        3.4028235e38,
        -3.4028235e38,
        1 + 2**-23,
        0.1,
    ]
    triples = [*itertools.product(special, repeat=3)]
    a, b = random.integers(0, 2**32, (2, many), dtype=np.uint32).view(F32)
    small = np.ldexp(random.standard_normal((2, many)), random.integers(-80, -55, (2, many)))
    subnormal = random.integers(0, 2**24, many, dtype=np.uint32).view(F32)
    with np.errstate(all="ignore"):
        triples += zip(a, b, -a * b, strict=True)
        triples += zip(a, b, random.permutation(a), strict=True)
        triples += zip(*small, subnormal, strict=True)
    array = np.array(triples, F32)
    return np.ascontiguousarray(array[np.isfinite(array).all(1)].T)


@pytest.mark.parametrize("flags", [(), ("-DCUSIM_PORTABLE_FMA",)], ids=["fast", "portable"])
def test_fma_rounds_toward_either_infinity(flags):
    a, b, c = awkward_triples()
    out = np.zeros((2, a.size), F32)
    kernel = Module(SAMPLES, flags).get_function("fma_down_up")
    kernel(-(-a.size // 256), 256, (a, b, c, out, np.int32(a.size)))
    assert a.size > 5000
    for x, y, z, down, up in zip(*(v.tolist() for v in (a, b, c)), *out, strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        expected = [round_down(exact), -round_down(-exact)]
        assert [down, up] == expected, (x.hex(), y.hex(), z.hex(), down, up, expected)
        if exact == 0:  # the sum of unlike zeros is -0 only where rounding goes down
            product_negative = math.copysign(1, x) * math.copysign(1, y) < 0
            alike = x * y == 0 and z == 0 and product_negative == (math.copysign(1, z) < 0)
            signs = [product_negative] * 2 if alike else [True, False]
            assert [bool(np.signbit(down)), bool(np.signbit(up))] == signs, (x, y, z)


def test_fma_leaves_the_rounding_mode_alone(module):
    a = np.array([np.inf, np.nan, 1, 1], F32)
    b, c = np.array([1, 1, 1, -1], F32), np.array([-np.inf, 0, np.inf, -np.inf], F32)
    out = np.zeros((2, 4), F32)
    module.get_function("fma_down_up")(1, 4, (a, b, c, out, np.int32(4)))
    assert np.isnan(out[:, :2]).all() and (out[:, 2:] == [np.inf, -np.inf]).all()
    assert F32(1) + F32(2.0**-25) == 1 and F32(-1) - F32(2.0**-25) == -1


# ---- faults ----


@pytest.mark.parametrize("at", ["start", "end"])
def test_guarded_memory(either, at):
    kernel = either.get_function("touch")
    data = guarded(np.arange(10, dtype=F32), at)
    for index in (0, 9):
        kernel(1, 1, (data, np.int32(index)))
    assert data.tolist() == [1, 1, 2, 3, 4, 5, 6, 7, 8, 10]
    index, where = (-1, "4 bytes before the start of") if at == "start" else (10, "0 bytes past the end of")
    with pytest.raises(
        RuntimeError, match=rf"touch, block .* thread \(0,0,0\): memory fault.* {where} argument 0"
    ):
        kernel(1, 1, (data, np.int32(index)))
    kernel(1, 1, (data, np.int32(5)))  # all goes on as if nothing had happened
    assert data[5] == 6


def test_guarded_memory_has_its_options(module):
    kernel = module.get_function("touch")
    constant = guarded(np.zeros(3, F32), writable=False)
    with pytest.raises(RuntimeError, match="argument 0, which may only be read"):
        kernel(1, 1, (constant, np.int32(1)))
    aligned = guarded(np.zeros((5, 1), F32), align=16)
    assert aligned.ctypes.data % 16 == 0 and aligned.shape == (5, 1)
    empty = guarded(np.zeros(0, F32))
    with pytest.raises(RuntimeError, match="0 bytes past the end"):
        kernel(1, 1, (empty, np.int32(0)))
    with pytest.raises(ValueError, match="at must be"):
        guarded(np.zeros(1), "middle")


def test_other_faults(either):
    with pytest.raises(RuntimeError, match="memory fault|null pointer"):
        either.get_function("touch")(1, 1, (0, np.int32(0)))
    out = np.ones(1, np.int32)
    with pytest.raises(RuntimeError, match="division by zero"):
        either.get_function("divide")(1, 1, (out, np.int32(1), np.int32(0)))
    with pytest.raises(RuntimeError, match="stack overflow"):
        either.get_function("recurse")(1, 1, (out, np.int32(100)))
    with pytest.raises(RuntimeError, match="what the kernel assumes does not hold: value > 0"):
        either.get_function("assume")(1, 1, (out, np.int32(0)))
    out[0] = 0
    with pytest.raises(RuntimeError, match=r"thread \(0,0,0\): the launch has not ended after 0.2 s"):
        either.get_function("endless")(1, 32, (out,), seconds=0.2)


# ---- undefined behaviour ----


@pytest.mark.parametrize(
    ("kernel", "args", "place", "message"),
    [
        ("add", (INT_MAX, np.int32(1)), "a + b;", "signed integer overflow"),
        ("shift", (np.int32(1), np.int32(32)), "a << b", "shift"),
        ("divide", (np.int32(-(2**31)), np.int32(-1)), "a / b", "division"),
        ("to_integer", (F32(np.nan),), "(int)a", "cannot hold it"),
        ("to_integer", (F32(3e9),), "(int)a", "cannot hold it"),
        (
            "shared_index",
            (np.int32(8),),
            "line[index] = 1;\n  *out = line[index];",
            "8 is out of bounds of 'int",
        ),
        ("local_index", (np.int32(-1),), "line[index] = 1;\n  *out = line[index & 7]", "-1 is out of bounds"),
    ],
)
def test_undefined_behaviour_is_reported(checked, kernel, args, place, message):
    out = np.zeros(1, np.int32)
    with pytest.raises(RuntimeError, match=rf"kernel {kernel}, .*undefined behaviour") as error:
        checked.get_function(kernel)(1, 32, (out, *args))
    assert message in str(error.value) and line_of(place) + ":" in str(error.value)
    harmless = [np.float32(1)] if kernel == "to_integer" else [np.int32(1)] * len(args)
    checked.get_function(kernel)(1, 32, (out, *harmless))


def test_misaligned_vectors_are_reported(checked):
    values, out = guarded(np.arange(6, dtype=F32), "start"), np.zeros(1, F32)
    checked.get_function("load_vector")(1, 1, (values, out))
    assert out[0] == 1
    with pytest.raises(RuntimeError, match="misaligned address .* which needs 16"):
        checked.get_function("load_vector")(1, 1, (values[1:], out))
