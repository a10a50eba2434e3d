"""capturable=True with real CUDA graphs: replays are steps, bit for bit, and nothing waits for the device."""

from __future__ import annotations

import gc
import shutil
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import shard4bit
from shard4bit.cuda import tables
from shard4bit.cuda.source import scalars_text
from shard4bit.dispatch import backend_for
from shard4bit.maths.update import ADAMW, SGD, Rule
from tests.cuda.test_capture import (
    BETAS,
    DTYPES,
    MAKERS,
    RATES,
    SGD_GROUPS,
    SHAPES,
    UNUSED,
    check_scalars,
    recipes_of,
)
from tests.cuda.test_kernels_optimizers import grads, starts
from tests.gpu.quiet import quiet
from tests.test_invariance import bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def warm_up(step: Callable[[], Any], steps: int = 3) -> None:
    """On a side stream, as torch's documentation of CUDA graphs has it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(steps):
            step()
    torch.cuda.current_stream().wait_stream(side)


def capture(step: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(bits(a.detach().cpu()), bits(b.detach().cpu()))


def compare(ours: Any, params: list[Any], theirs: Any, twins: list[Any], where: Any) -> None:
    for i, (p, q) in enumerate(zip(params, twins, strict=True)):
        assert same(p, q), (where, i, "param")
        assert ours.state[p].keys() == theirs.state[q].keys()
        for key, value in ours.state[p].items():
            assert same(value, theirs.state[q][key]), (where, i, key)


# ---- the scalars ----


def launched(rule: Rule, group: dict[str, Any], counts: torch.Tensor, maximize: bool) -> np.ndarray:
    on_device = counts.cuda()
    if isinstance(group["lr"], torch.Tensor):
        group = {**group, "lr": group["lr"].cuda()}
    runtime: Any = backend_for(torch.device("cuda", torch.cuda.current_device())).runtime  # type: ignore[attr-defined]
    recipes = runtime.upload(recipes_of(rule, group, on_device, maximize))
    room = len(counts) * tables.HYPER.itemsize
    hypers = torch.full((room,), 255, dtype=torch.uint8, device="cuda")
    args = (recipes.data_ptr(), hypers.data_ptr(), np.int32(len(counts)))
    launch = scalars_text(), f"{rule.name}_scalars", -(-len(counts) // 128), 128, args
    runtime.queue([runtime.prepare(*launch)])
    return hypers.cpu().numpy().view(tables.HYPER)


@pytest.mark.parametrize("maximize", [False, True])
def test_scalars_are_the_host_s(maximize: bool) -> None:
    for i, betas in enumerate(BETAS):
        for lr in RATES:
            group = {"lr": lr, "betas": betas, "eps": [1e-8, 0.0, 1e5][i % 3], "weight_decay": 0.1 * (i % 2)}
            group["compensate"] = i % 2 == 0
            check_scalars(ADAMW, group, maximize, launched)
    for group in SGD_GROUPS:
        for lr in RATES:
            check_scalars(SGD, {"lr": lr, **group}, maximize, launched)


# ---- steps of given gradients ----


class Pair:
    """An optimizer whose steps are captured, and its twin, capturable=False, whose steps are not."""

    def __init__(self, kind: str, lr_dtype: torch.dtype = torch.float32) -> None:
        make, options = MAKERS[kind]
        begin = [s.to(d).cuda() for s, d in zip(starts(SHAPES), DTYPES, strict=True)]
        self.params, self.twins = ([nn.Parameter(s.clone()) for s in begin] for _ in range(2))
        self.lr = torch.tensor(0.01, dtype=lr_dtype, device="cuda")

        def grouped(params: list[Any]) -> list[Any]:
            return [{"params": params[i::3], **options[i]} for i in range(3)]

        self.captured = make(grouped(self.params), lr=self.lr, capturable=True)
        self.eager = make(grouped(self.twins), lr=0.01)
        self.number = 0
        for i, (p, q) in enumerate(zip(self.params, self.twins, strict=True)):
            if i != UNUSED:
                p.grad, q.grad = torch.zeros_like(p), torch.zeros_like(q)

    def step(self, act: Callable[[], Any] | None = None, lr: float | None = None) -> None:
        """One step of both with new gradients; ``act`` in place of the first one's."""
        self.number += 1
        if lr is not None:
            self.lr.fill_(lr)
        for group in self.eager.param_groups:
            group["lr"] = self.lr.item()
        for p, q, grad in zip(self.params, self.twins, grads(SHAPES, self.number), strict=True):
            if p.grad is not None and q.grad is not None:
                p.grad.copy_(grad)
                q.grad.copy_(grad)
        (act or self.captured.step)()
        self.eager.step()
        compare(self.captured, self.params, self.eager, self.twins, self.number)


@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64], ids=["lr32", "lr64"])
@pytest.mark.parametrize("kind", MAKERS)
def test_replays_are_steps(kind: str, lr_dtype: torch.dtype) -> None:
    """Replays with another learning rate and other gradients each, then steps and replays in turns."""
    pair = Pair(kind, lr_dtype)
    for _ in range(2):
        pair.step(lambda: warm_up(pair.captured.step, 1))
    graph = capture(pair.captured.step)
    compare(pair.captured, pair.params, pair.eager, pair.twins, "the capture itself is no step")
    for i in range(5):
        pair.step(graph.replay, lr=0.02 / (i + 1))
    pair.step()
    pair.step(graph.replay, lr=0.3)
    pair.step(lr=0.1)
    pair.step(graph.replay)


def test_two_captures_and_steps_of_other_gradients() -> None:
    """Each graph keeps its own tables, whatever is uploaded, made anew or freed in between."""
    pair = Pair("rank1")
    pair.step(lambda: warm_up(pair.captured.step, 1))
    first = capture(pair.captured.step)
    old = [p.grad for p in pair.params]
    new = [None if g is None else g.clone() for g in old]
    for p, grad in zip(pair.params, new, strict=True):
        p.grad = grad
    second = capture(pair.captured.step)
    for graph, memory in ((first, old), (second, new), (first, old)):
        for p, grad in zip(pair.params, memory, strict=True):
            p.grad = grad
        pair.step(graph.replay)
        kept = [(p, p.grad) for p in (pair.params[1], pair.twins[1])]
        for p, _ in kept:
            p.grad = None
        pair.step()
        gc.collect()
        torch.cuda.empty_cache()
        for p, grad in kept:
            p.grad = grad


@pytest.mark.parametrize("kind", ["rank1", "factored", "nesterov"])
def test_a_step_waits_for_nothing(kind: str) -> None:
    pair = Pair(kind)
    for _ in range(4):
        pair.captured.step()
    with quiet():
        pair.captured.step()
        pair.lr.fill_(0.1)
        pair.captured.step()
    assert pair.captured.state[pair.params[0]]["step"].device.type == "cuda"
    assert int(pair.captured.state[pair.params[0]]["step"]) == 6


# ---- whole training steps ----


class Model(nn.Module):
    """Element by element, so that its gradients have the same bits in a graph and out of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.weight = nn.Parameter(torch.randn(130, 256))
        self.small = nn.Parameter(torch.randn(130, 1))
        self.unused = nn.Parameter(torch.randn(70, 80))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * x + self.small).tanh().square().mean()


class Training:
    def __init__(self, capturable: bool, second: str = "rank1") -> None:
        self.model = Model().cuda()
        self.lr: Any = torch.tensor(0.01, device="cuda") if capturable else 0.01
        self.optimizer = shard4bit.AdamW4bit(
            self.model.parameters(), lr=self.lr, second_moment=second, capturable=capturable
        )
        self.x = torch.zeros(130, 256, device="cuda")

    def feed(self, number: int, lr: float) -> None:
        self.x.copy_(torch.randn(130, 256, generator=torch.Generator().manual_seed(number)))
        if isinstance(self.lr, torch.Tensor):
            self.lr.fill_(lr)
        else:
            self.optimizer.param_groups[0]["lr"] = torch.tensor(lr).item()  # as float32 has it

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.backward_and_step()

    def backward_and_step(self) -> None:
        self.model(self.x).backward()
        self.optimizer.step()


@pytest.mark.parametrize("second", ["rank1", "block", "factored"])
def test_training_in_a_graph(second: str, tmp_path: Path) -> None:
    """Forward, backward and step captured as torch's documentation has it; then steps outside of the graph,
    replays again, and checkpoints of the same bytes."""
    ours, eager = Training(True, second), Training(False, second)
    rates = iter(0.03 / (1 + i) for i in range(20))
    number = 0

    def both(act: Callable[[], Any]) -> None:
        nonlocal number
        number, lr = number + 1, next(rates)
        ours.feed(number, lr)
        eager.feed(number, lr)
        act()
        eager.step()
        params, twins = (list(t.model.parameters()) for t in (ours, eager))
        compare(ours.optimizer, params, eager.optimizer, twins, number)

    for _ in range(3):
        both(lambda: warm_up(ours.step, 1))
    ours.optimizer.zero_grad(set_to_none=True)  # gradients come from the graph's pool
    graph = capture(ours.backward_and_step)
    for _ in range(5):
        both(graph.replay)
    both(ours.step)
    both(graph.replay)
    for training, name in ((ours, "ours"), (eager, "eager")):
        training.optimizer.param_groups[0]["lr"] = 0.01
        shard4bit.save(tmp_path / name, training.model, training.optimizer, step=number)
    files = [p.relative_to(tmp_path / "ours") for p in (tmp_path / "ours").rglob("*") if p.is_file()]
    assert files
    for file in files:
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "eager" / file).read_bytes(), file


def test_states_loaded_after_the_capture() -> None:
    """They are copied to where the graph looks, the counts too."""
    pair = Pair("rank1")
    pair.step()
    saved = {
        i: {key: value.clone() for key, value in state.items()}
        for i, state in pair.captured.state_dict()["state"].items()
    }
    start = [p.detach().clone() for p in pair.params]
    pair.step()
    graph = capture(pair.captured.step)
    pair.step(graph.replay)
    pair.captured.load_state_dict({**pair.captured.state_dict(), "state": saved})
    pair.eager.load_state_dict({**pair.eager.state_dict(), "state": saved})
    for group in pair.captured.param_groups:
        group["lr"] = pair.lr  # which loading replaced by a copy
    for p, q, value in zip(pair.params, pair.twins, start, strict=True):
        p.data.copy_(value)
        q.data.copy_(value)
    for _ in range(2):
        pair.step(graph.replay)
    assert int(pair.captured.state[pair.params[0]]["step"]) == 3


# ---- what cannot be captured ----


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize(
    "make, warm, message",
    [
        (partial(shard4bit.AdamW4bit, capturable=False), True, "build the optimizer with capturable=True"),
        (partial(shard4bit.AdamW4bit, capturable=True), False, "first step with these parameters"),
        (
            partial(shard4bit.AdamW4bit, capturable=True, lr=torch.tensor(0.1)),
            True,
            "lr is a tensor on cpu.*expected one on cuda",
        ),
    ],
    ids=["not capturable", "not warm", "lr on the host"],
)
def test_refused(make: Any, warm: bool, message: str) -> None:
    """The capture raises, and the optimizer goes on outside of it."""
    param = nn.Parameter(torch.ones(65, 64, device="cuda"))
    param.grad = torch.ones_like(param)
    optimizer = make([param])
    if warm:
        warm_up(optimizer.step)
    before = param.detach().clone()
    with pytest.raises(ValueError, match=message):
        capture(optimizer.step)
    assert torch.equal(param, before)
    optimizer.step()
    assert not torch.equal(param, before) and bool(param.isfinite().all())


def test_states_without_kernels() -> None:
    param = nn.Parameter(torch.ones(65, 64, device="cuda"))
    param.grad = torch.ones_like(param)
    optimizer = shard4bit.AdamW4bit([param], capturable=True, **shard4bit.spec.ADAMW_8BIT)
    with pytest.raises(ValueError, match="moments stored as"):
        optimizer.step()


# ---- torch.compile ----


def compiles() -> bool:
    """Whether inductor finds what it needs: triton, a C compiler, Python's headers."""
    from torch.utils._triton import has_triton

    headers = Path(sysconfig.get_path("include")) / "Python.h"
    found = shutil.which("gcc") or shutil.which("cc")
    return has_triton() and bool(found) and headers.exists()


def trained(capturable: bool, wrap: Callable[[Any], Any]) -> tuple[list[float], list[torch.Tensor]]:
    training = Training(capturable)

    def step() -> torch.Tensor:
        loss = training.model(training.x)
        loss.backward()
        training.optimizer.step()
        training.optimizer.zero_grad()
        return loss

    act, losses = wrap(step), []
    for number in range(6):
        training.feed(number, 0.01)
        losses.append(float(act()))
    return losses, [p.detach() for p in training.model.parameters()]


@pytest.mark.filterwarnings("ignore")  # of torch.compile, about what it meets on its way
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_loops(backend: str, capturable: bool) -> None:
    """The same bits where nothing is fused; inductor's own arithmetic is near."""
    if backend == "inductor" and not compiles():
        pytest.skip("inductor needs triton, a C compiler and Python's headers")
    torch._dynamo.reset()
    losses, params = trained(capturable, lambda f: f)
    found, others = trained(capturable, torch.compile(backend=backend))
    if backend == "aot_eager":
        assert found == losses and all(map(same, params, others))
    assert found == pytest.approx(losses, rel=1e-3)
