"""capturable=True through the emulator: scalars that the device computes, steps that are captured and
replayed, and what cannot be captured. (tests/gpu/test_capture.py does the same with CUDA graphs.)"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import shard4bit
from shard4bit.backend import Work
from shard4bit.cuda import tables
from shard4bit.cuda.backend import KernelBackend, _pack_scalars, _recipe
from shard4bit.cuda.source import scalars_text
from shard4bit.layout import Neighbours, Slab
from shard4bit.maths.update import ADAMW, SGD, Rule
from shard4bit.placement import place
from tests.cuda.emulator import DESCENDING, Module, available
from tests.cuda.runtime import EmulatorRuntime, Graph, served_by
from tests.cuda.test_kernels_launches import LAUNCHES, maker, sent
from tests.cuda.test_kernels_optimizers import grads, starts
from tests.test_invariance import bits

pytestmark = pytest.mark.skipif(not available(), reason="the emulator needs g++")

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16

# ---- the scalars ----

COUNTS = [*range(2000), *np.random.default_rng(0).integers(2000, 2**24, 500).tolist(), 2**24 - 1]
BETAS = [(0.9, 0.999), (0.9, 0.95), (0.0, 0.0), (0.5, 0.24), (1 - 2.0**-53, 1 - 2.0**-30), (1e-8, 0.25)]
RATES = [1e-3, 0.0, 1e5, 1e-43, torch.tensor([3e-4]), torch.tensor(2e-4, dtype=F64)]
SGD_GROUPS = [
    {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01, "nesterov": False},
    {"momentum": 1.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": True},
    {"momentum": 0.9, "dampening": 0.0, "weight_decay": 0.1, "nesterov": False, "compensate": True},
]


def recipes_of(rule: Rule, group: dict[str, Any], counts: torch.Tensor, maximize: bool) -> np.ndarray:
    work = Work(Slab.whole((1,)), [], torch.zeros(1), [None], {}, maximize, options=rule.options(group))
    recipes = np.repeat(_recipe(work, adamw=rule is ADAMW), len(counts))
    recipes["count"] = counts.data_ptr() + 4 * np.arange(len(counts), dtype=np.uint64)
    return recipes


def launched(rule: Rule, group: dict[str, Any], counts: torch.Tensor, maximize: bool) -> np.ndarray:
    """The records that the kernel makes of steps after ``counts``."""
    recipes = recipes_of(rule, group, counts, maximize)
    hypers = np.full(len(counts) * tables.HYPER.itemsize, 255, np.uint8).view(tables.HYPER)
    kernel = Module(scalars_text()).get_function(f"{rule.name}_scalars")
    kernel(-(-len(counts) // 128), 128, (recipes, hypers, np.int32(len(counts))))
    return hypers


def check_scalars(rule: Rule, group: dict[str, Any], maximize: bool, launch: Any = launched) -> None:
    found = launch(rule, group, torch.tensor(COUNTS, dtype=F32), maximize)
    expected = np.zeros(len(COUNTS), tables.HYPER)
    fields = {name: expected[name] for name in tables.HYPER.names or ()}
    for at, count in enumerate(COUNTS):
        scalars = rule.scalars(group, count + 1)
        work = Work(Slab.whole((1,)), [], torch.zeros(1), [None], scalars, maximize)
        _pack_scalars(fields, at, work, adamw=rule is ADAMW)
    for name in fields:
        same = expected[name].view(np.int32) == found[name].view(np.int32)
        assert same.all(), (name, np.argwhere(~same)[:3].tolist())


@pytest.mark.parametrize("betas", BETAS, ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_adamw_s_scalars_are_the_host_s(betas: tuple[float, float], maximize: bool) -> None:
    """Every bit of every record, for each step to 2,000 and some to the last that a float32 counts."""
    decays, epsilons = [0.0, 0.1, 0.01], [1e-8, 0.0, 1.0, 1e5]
    for i, lr in enumerate(RATES):
        group = {"lr": lr, "betas": betas, "eps": epsilons[i % 4], "weight_decay": decays[i % 3]}
        group |= {"compensate": i % 2 == 1, "rounding": ["nearest", "stochastic"][i // 2 % 2]}
        check_scalars(ADAMW, group, maximize)


@pytest.mark.parametrize("group", SGD_GROUPS, ids=str)
@pytest.mark.parametrize("maximize", [False, True])
def test_sgd_s_scalars_are_the_host_s(group: dict[str, Any], maximize: bool) -> None:
    for lr in RATES:
        check_scalars(SGD, {"lr": lr, **group}, maximize)


def test_recipes_are_laid_out_as_in_c() -> None:
    names = list(tables.RECIPE.names or ())
    asked = ["sizeof(Recipe)", *(f"__builtin_offsetof(Recipe, {name})" for name in names)]
    probe = f"""extern "C" __global__ void probe(u64* out) {{
      u64 found[] = {{{", ".join(asked)}}};
      for (u64 i = 0; i < sizeof(found) / 8; ++i) out[i] = found[i];
    }}"""
    assert tables.RECIPE.fields is not None
    expected = [tables.RECIPE.itemsize, *(tables.RECIPE.fields[name][1] for name in names)]
    found = np.zeros(len(expected), np.uint64)
    Module(scalars_text() + probe).get_function("probe")(1, 1, (found,))
    assert found.tolist() == expected


# ---- captured steps ----

SHAPES = [(70, 256), (40, 104), (61, 131), (16385,), (5, 6), (33, 640), (33, 256)]
DTYPES = [F32, BF16, F32, BF16, F32, F32, BF16]
UNUSED = 5  # the parameter that never has a gradient
ADAMW_OPTIONS: list[dict[str, Any]] = [
    {},
    {"betas": (0.5, 0.24), "maximize": True},
    {"eps": 1e-3, "weight_decay": 0.0, "compensate": True},
]
DRAWN_OPTIONS = [*ADAMW_OPTIONS[:2], {"weight_decay": 0.0, "rounding": "stochastic"}]
SGD_OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.5, "maximize": True},
    {"weight_decay": 0.0, "compensate": True},
]
MAKERS: dict[str, tuple[Callable[..., Any], list[dict[str, Any]]]] = {
    "rank1": (partial(shard4bit.AdamW4bit, weight_decay=0.1), ADAMW_OPTIONS),
    "block": (partial(shard4bit.AdamW4bit, weight_decay=0.1, second_moment="block"), DRAWN_OPTIONS),
    "factored": (partial(shard4bit.AdamW4bit, weight_decay=0.1, second_moment="factored"), ADAMW_OPTIONS),
    "fp32": (partial(shard4bit.AdamW4bit, quantize=False), ADAMW_OPTIONS),
    "dampening": (partial(shard4bit.SGD4bit, weight_decay=0.01, dampening=0.1), SGD_OPTIONS),
    "nesterov": (partial(shard4bit.SGD4bit, weight_decay=0.01, nesterov=True), SGD_OPTIONS),
}


class Pair:
    """An optimizer whose steps are captured, with lr in a tensor and gradients that stay in their memory; and
    its twin, capturable=False, whose steps are not."""

    def __init__(self, kind: str, lr_dtype: torch.dtype = F32, order: int = 0) -> None:
        self.runtime, self.other = EmulatorRuntime(order), EmulatorRuntime()
        self.backend = KernelBackend(self.runtime)
        make, options = MAKERS[kind]
        begin = [s.to(d) for s, d in zip(starts(SHAPES), DTYPES, strict=True)]
        self.params, self.twins = ([torch.nn.Parameter(s.clone()) for s in begin] for _ in range(2))
        self.lr = torch.tensor([0.01], dtype=lr_dtype)

        def grouped(params: list[Any]) -> list[Any]:
            return [{"params": params[i::3], **options[i]} for i in range(3)]

        self.captured = make(grouped(self.params), lr=self.lr, capturable=True)
        self.eager = make(grouped(self.twins), lr=0.01)
        self.number = 0
        for p, q in zip(self.params, self.twins, strict=True):
            p.grad, q.grad = torch.zeros_like(p), torch.zeros_like(q)
        self.params[UNUSED].grad = self.twins[UNUSED].grad = None

    def step(self, act: Callable[[], Any] | None = None, lr: float | None = None) -> None:
        """One step of both with new gradients; ``act`` in place of the first one's."""
        self.number += 1
        if lr is not None:
            self.lr.fill_(lr)
        for group in self.eager.param_groups:
            group["lr"] = self.lr.item()
        given = grads(SHAPES, self.number)
        for p, q, grad in zip(self.params, self.twins, given, strict=True):
            if p.grad is not None and q.grad is not None:
                p.grad.copy_(grad)
                q.grad.copy_(grad)
        with served_by(self.backend):
            (act or self.captured.step)()
        with served_by(KernelBackend(self.other)):
            self.eager.step()
        self.compare()

    def compare(self) -> None:
        for i, (p, q) in enumerate(zip(self.params, self.twins, strict=True)):
            ours, theirs = self.captured.state[p], self.eager.state[q]
            assert ours.keys() == theirs.keys()
            pairs = {"param": (p.detach(), q.detach())} | {k: (ours[k], theirs[k]) for k in ours}
            for key, (a, b) in pairs.items():
                assert torch.equal(bits(a), bits(b)), (self.number, i, key)
        assert self.captured.state[self.params[UNUSED]]["step"] == 0

    def capture(self) -> Graph:
        with served_by(self.backend), Graph(self.runtime) as graph:
            self.captured.step()
        return graph


@pytest.mark.parametrize("lr_dtype", [F32, F64], ids=["lr32", "lr64"])
@pytest.mark.parametrize("kind", MAKERS)
def test_replays_are_steps(kind: str, lr_dtype: torch.dtype) -> None:
    """Replays with another learning rate and other gradients each, then steps and replays in turns."""
    pair = Pair(kind, lr_dtype, DESCENDING)
    for _ in range(2):
        pair.step()
    before = [p.detach().clone() for p in pair.params]
    graph = pair.capture()
    assert all(map(torch.equal, before, pair.params)), "the capture itself is no step"
    pair.compare()
    for i in range(5):
        pair.step(graph.replay, lr=0.02 / (i + 1))
    pair.step()
    pair.step(graph.replay, lr=0.3)
    pair.step(lr=0.1)
    pair.step(graph.replay)


def test_the_reference_agrees() -> None:
    """The twin of the other tests is itself the reference's."""
    pair = Pair("rank1")
    for _ in range(3):
        pair.step()
    make, options = MAKERS["rank1"]
    params = [torch.nn.Parameter(s.to(d)) for s, d in zip(starts(SHAPES), DTYPES, strict=True)]
    reference = make([{"params": params[i::3], **options[i]} for i in range(3)], lr=pair.lr.item())
    for step in range(1, 4):
        for i, (p, grad) in enumerate(zip(params, grads(SHAPES, step), strict=True)):
            p.grad = None if i == UNUSED else grad.to(p.dtype)
        reference.step()
    assert all(torch.equal(bits(p), bits(q)) for p, q in zip(params, pair.params, strict=True))


@pytest.mark.parametrize("kind", ["rank1", "dampening"])
def test_a_first_step_that_is_replayed(kind: str) -> None:
    """Warmed up, put back to the start, replayed: the device finds a count of 0."""
    pair = Pair(kind)
    with served_by(pair.backend):
        state, begin = pair.captured.state_dict(), [p.detach().clone() for p in pair.params]
        state = {
            **state,
            "state": {i: {k: t.clone() for k, t in s.items()} for i, s in state["state"].items()},
        }
        pair.captured.step()
        graph = pair.capture()
        pair.captured.load_state_dict(state)
    for p, start in zip(pair.params, begin, strict=True):
        p.data.copy_(start)
    with served_by(KernelBackend(pair.other)):
        pair.eager.bind()
    for group in pair.captured.param_groups:
        group["lr"] = pair.lr  # which loading replaced by a copy
    for _ in range(3):
        pair.step(graph.replay)


def test_parameters_of_other_counts() -> None:
    """A parameter without a gradient in the first step is at another count in one launch with the others."""
    pair = Pair("rank1")
    kept = [(p, p.grad) for p in (pair.params[0], pair.twins[0])]
    for p, _ in kept:
        p.grad = None
    pair.step()
    for p, grad in kept:
        p.grad = grad
    pair.step()
    graph = pair.capture()
    for _ in range(2):
        pair.step(graph.replay)
    assert [int(pair.captured.state[p]["step"]) for p in pair.params[:2]] == [3, 4]


def test_tensors_that_are_not_dense() -> None:
    """The copies that a step works on, and what it writes back, are part of the capture."""
    pair = Pair("block")
    for params in (pair.params, pair.twins):
        params[0].data = params[0].data.t().contiguous().t()
        params[0].grad = params[0].grad.t().contiguous().t()
    pair.step()
    graph = pair.capture()
    for _ in range(3):
        pair.step(graph.replay)


def test_two_captures() -> None:
    """Of gradients in other memory: each replay finds its own table, whatever was uploaded in between."""
    pair = Pair("rank1")
    pair.step()
    first = pair.capture()
    old = [p.grad for p in pair.params]
    new = [None if g is None else g.clone() for g in old]
    for p, grad in zip(pair.params, new, strict=True):
        p.grad = grad
    second = pair.capture()
    for _ in range(2):
        for graph, memory in ((first, old), (second, new)):
            for p, grad in zip(pair.params, memory, strict=True):
                p.grad = grad
            pair.step(graph.replay)
        pair.step()


def test_what_a_graph_points_to_is_kept() -> None:
    """Steps of other gradients in between replace the tables of a step; those of a capture stay."""
    pair = Pair("rank1")
    pair.step()
    graph = pair.capture()
    kept = [(p, p.grad) for p in (pair.params[1], pair.twins[1])]
    for p, _ in kept:
        p.grad = None
    for _ in range(3):
        pair.step()
    gc.collect()
    fill = [torch.full((n,), 255, dtype=torch.uint8) for n in range(0, 40_000, 8)]  # of what was freed
    for p, grad in kept:
        p.grad = grad
    pair.step(graph.replay)
    del fill
    assert pair.captured._counts.captured and not pair.eager._counts.captured


def test_many_captures() -> None:
    """Each has its own table, however many there are without a step between them."""
    pair = Pair("rank1")
    pair.step()
    captures = []
    for _ in range(9):
        for p in pair.params:
            p.grad = None if p.grad is None else p.grad.clone()
        captures.append((pair.capture(), [p.grad for p in pair.params]))
    for graph, memory in captures[::3]:
        for p, grad in zip(pair.params, memory, strict=True):
            p.grad = grad
        pair.step(graph.replay)


@pytest.mark.parametrize("kind", LAUNCHES)
def test_launches(kind: str) -> None:
    """Two more small ones than otherwise."""
    runtime = EmulatorRuntime()
    params = [torch.nn.Parameter(torch.ones(s)) for s in ((65, 64), (5, 7))]
    optimizer = maker(kind)(params, capturable=True)
    for param in params:
        param.grad = torch.ones_like(param)
    with served_by(KernelBackend(runtime)):
        optimizer.step()
        runtime.launches.clear()
        runtime.uploads.clear()
        optimizer.step()
    rule = "sgd" if kind == "sgd" else "adamw"
    expected = [f"{rule}_scalars", *LAUNCHES[kind], "count_steps"]
    expected.sort(key=lambda name: name != "clear")  # comes first
    assert sent([name for name, _ in runtime.launches]) == (2, expected)  # of at most 184 bytes
    assert runtime.uploads == [] and 184 < 2 * (24 + tables.RECIPE.itemsize) <= 2 * 184


# ---- ranks ----


class Ranks:
    """A process group of this rank and one that has (or lacks) gradients and sees nothing but zeros."""

    def __init__(self, *, other: bool) -> None:
        self.other = other

    def all_reduce(self, vector: torch.Tensor, *, maximum: bool) -> None:
        if maximum:  # flags: failure, then which parameters have a gradient
            vector[1:3].copy_(torch.maximum(vector[1:3], torch.tensor(float(self.other)).view(torch.int32)))


def sharded(optimizer: Any, *, other: bool) -> Any:
    group = Ranks(other=other)
    optimizer.set_layout(
        lambda param, name: [replace(place(param, name), neighbours=((group, Neighbours("rows")),))]
    )
    return optimizer


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("kind", ["rank1", "dampening"])
def test_gradients_on_another_rank(kind: str, other: bool) -> None:
    """Whether a parameter steps is known after the reduction: the device counts those that do."""
    results = []
    for capturable in (False, True):
        params = [torch.nn.Parameter(s) for s in starts([(65, 64), (40, 104)])]
        optimizer = sharded(MAKERS[kind][0](params, capturable=capturable), other=other)
        for step in range(1, 4):
            params[0].grad, params[1].grad = grads([(65, 64), (40, 104)], step)
            if step != 2:
                params[1].grad = None
            with served_by(KernelBackend(EmulatorRuntime())):
                optimizer.step()
        assert [int(optimizer.state[p]["step"]) for p in params] == [3, 3 if other else 1]
        results.append(
            [p.detach() for p in params] + [t for p in params for t in optimizer.state[p].values()]
        )
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(*results, strict=True))


# ---- what cannot be captured ----


def simple(**options: Any) -> tuple[Any, torch.nn.Parameter]:
    param = torch.nn.Parameter(torch.ones(65, 64))
    param.grad = torch.ones_like(param)
    return shard4bit.AdamW4bit([param], **{"capturable": True, **options}), param


def captured(optimizer: Any, runtime: EmulatorRuntime, backend: Any) -> Graph:
    with served_by(backend), Graph(runtime) as graph:
        optimizer.step()
    return graph


def refused(optimizer: Any, message: str, *, warm: bool = True, change: Callable[[], Any] = int) -> None:
    """A capture raises, changes nothing, and a step after it is as if it had not been tried."""
    runtime = EmulatorRuntime()
    backend = KernelBackend(runtime)
    params = [p for g in optimizer.param_groups for p in g["params"]]
    with served_by(backend):
        if warm:
            optimizer.step()
    change()
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=message):
        captured(optimizer, runtime, backend)
    assert all(map(torch.equal, before, params))
    with served_by(backend):
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        optimizer.step()
    assert not any(map(torch.equal, before, params))


def test_capturable_is_off() -> None:
    refused(simple(capturable=False)[0], "build the optimizer with capturable=True")


def test_nothing_is_warmed_up() -> None:
    refused(simple()[0], "first step with these parameters", warm=False)


def test_gradients_of_another_dtype() -> None:
    optimizer, param = simple()

    def change() -> None:
        param.grad, param.grad_dtype = None, BF16
        param.grad = torch.ones_like(param, dtype=BF16)

    refused(optimizer, "first step with these gradients", change=change)


def test_parameters_that_ranks_share() -> None:
    refused(sharded(simple()[0], other=False), "parameters are sharded, and the host reads")


def test_a_rate_on_another_device() -> None:
    optimizer, _ = simple(lr=torch.tensor(0.1))

    def change() -> None:
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="meta")

    refused(optimizer, "lr is a tensor on meta", change=change)


def test_a_rate_of_another_dtype() -> None:
    optimizer, _ = simple()

    def change() -> None:
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1, dtype=BF16)

    refused(optimizer, r"lr of shape \(\) and dtype torch.bfloat16", change=change)


@pytest.mark.parametrize(
    "make, message",
    [
        (partial(shard4bit.AdamW4bit, second_moment="B128/DE"), "moments stored as"),
        (partial(shard4bit.AdamW4bit, **shard4bit.spec.ADAMW_8BIT), "moments stored as"),
        (partial(shard4bit.SGD4bit, momentum=0.0), "no momentum"),
    ],
    ids=["ablation", "8bit", "plain"],
)
def test_states_without_kernels(make: Any, message: str) -> None:
    param = torch.nn.Parameter(torch.ones(65, 64))
    param.grad = torch.ones_like(param)
    optimizer = make([param], capturable=True)
    with served_by(KernelBackend(EmulatorRuntime())), pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(param, torch.ones(65, 64))
