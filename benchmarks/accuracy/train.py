"""One run: a task trained with the optimizer of one arm from one seed.

Weights, order of data and dropout follow the seed alone, so that arms are paired; a row records digests
of the first two.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.accuracy.arms import make_optimizer

CHECK_EVERY = 10  # steps between looks at the losses (each waits for the GPU)
CURVE_POINTS = 60


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a task trains: the same for all arms. floor: share of ``lr`` that the cosine ends at.

    clip: largest gradient norm, 0 for none. Divergence: a loss above ``diverged`` times the first one.
    """

    steps: int
    batch: int
    lr: float
    warmup: int
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    floor: float = 0.1
    diverged: float = 1.5

    def options(self) -> dict[str, Any]:
        """What every arm's optimizer is given."""
        names = ("lr", "betas", "eps", "weight_decay")
        return {name: getattr(self, name) for name in names}

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0: linear warm-up, then cosine."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        part = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * part)))


class Replayed:
    """A function of tensors on a GPU that is captured once and then replayed: a step of a small model has
    hundreds of launches, for which the GPU waits otherwise."""

    def __init__(self, function: Callable[..., Tensor], example: tuple[Tensor, ...]) -> None:
        self.inputs = tuple(t.clone() for t in example)
        state = torch.cuda.get_rng_state()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles, and makes what is made once
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = function(*self.inputs)
        torch.cuda.set_rng_state(state)  # the first run's dropout is that of every later one

    def __call__(self, *inputs: Tensor) -> Tensor:
        for place, value in zip(self.inputs, inputs, strict=True):
            place.copy_(value)
        self.graph.replay()
        return self.output.clone()


class Task:
    """Data and model of an experiment. Subclasses give the methods that raise NotImplementedError.

    Attributes: recipe; unit, what ``seen`` counts; vocabulary of results: the keys of ``evaluate``.
    """

    unit = "tokens"

    def __init__(self, recipe: Recipe, device: torch.device, *, compiled: bool = False) -> None:
        self.recipe, self.device, self.compiled = recipe, device, compiled
        self.model: nn.Module | None = None
        self.run: Any = None
        self.replayed: Replayed | None = None

    def make(self) -> nn.Module:
        """A new model on the CPU, by torch's global seed."""
        raise NotImplementedError

    def batch(self, seed: int, step: int) -> tuple[Tensor, ...]:
        """What a step trains on, on the device: a function of its arguments alone."""
        raise NotImplementedError

    def loss(self, *batch: Tensor) -> Tensor:
        """The mean loss of a batch by ``self.run``, the model or its compiled form."""
        raise NotImplementedError

    def backward(self, *batch: Tensor) -> Tensor:
        """The mean loss of a batch; its gradients, clipped, in the parameters."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.grad = None
        with self.autocast():
            loss = self.loss(*batch)
        loss.backward()
        if self.recipe.clip:
            nn.utils.clip_grad_norm_(parameters, self.recipe.clip)
        return loss.detach()

    def gradients(self, seed: int, step: int) -> Tensor:
        """``backward`` of a step's batch, on a GPU by replay."""
        batch = self.batch(seed, step)
        if self.device.type != "cuda":
            return self.backward(*batch)
        if self.replayed is None:
            self.replayed = Replayed(self.backward, batch)
        return self.replayed(*batch)

    def parameters(self) -> list[nn.Parameter]:
        assert self.model is not None
        return list(self.model.parameters())

    def evaluate(self) -> dict[str, float]:
        """Held-out figures of the model as it is, in evaluation mode."""
        raise NotImplementedError

    def order(self, seed: int, step: int) -> np.ndarray:
        """Which examples a step takes."""
        raise NotImplementedError

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bf16 on the GPU, nothing on the CPU."""
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        return torch.autocast("cuda", torch.bfloat16)

    def begin(self, seed: int) -> str:
        """Set the model to the initial weights of a seed; returns their digest.

        The first call makes and compiles the model, later ones write into the same parameters.
        """
        torch.manual_seed(seed)
        fresh = self.make()
        digest = hashlib.sha256()
        for parameter in fresh.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        if self.model is None:
            self.model = fresh.to(self.device)
            self.run = torch.compile(self.model) if self.compiled else self.model
        else:
            self.model.load_state_dict(fresh.state_dict())
        self.model.train()
        return digest.hexdigest()[:16]


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of ``count`` examples, of (seed, epoch) alone."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 1, epoch])).permutation(count)


class Epochs:
    """Batches from shuffled epochs; a short rest of an epoch is left out."""

    def __init__(self, count: int, batch: int) -> None:
        if count < batch:
            raise ValueError(f"{count} examples for batches of {batch}")
        self.count, self.batch, self.each = count, batch, count // batch
        self.kept: tuple[tuple[int, int], np.ndarray] = ((-1, -1), np.zeros(0, int))

    def __call__(self, seed: int, step: int) -> np.ndarray:
        """Numbers (batch,) of the examples of a step."""
        epoch, place = divmod(step, self.each)
        if self.kept[0] != (seed, epoch):
            self.kept = (seed, epoch), shuffled(self.count, seed, epoch)
        return self.kept[1][place * self.batch : (place + 1) * self.batch]


class OutOfTimeError(Exception):
    """The deadline came during a run, which leaves no row."""


@dataclass
class Progress:
    """Losses so far. ``steps`` counts those looked at; they are looked at CHECK_EVERY together."""

    limit: float  # of divergence, as a multiple of the first loss
    losses: list[float] = field(default_factory=list)
    waiting: list[Tensor] = field(default_factory=list)

    def add(self, loss: Tensor) -> None:
        self.waiting.append(loss.float())

    def diverged(self) -> bool:
        """Look at what waits: whether some loss is not finite, or the mean of the last 20 is too high."""
        if self.waiting:
            self.losses += torch.stack(self.waiting).tolist()
            self.waiting = []
        recent = self.losses[-20:]
        bad = not all(map(math.isfinite, recent))
        return bad or sum(recent) / max(1, len(recent)) > self.limit * self.losses[0]


def curve(losses: list[float]) -> str:
    """At most CURVE_POINTS means of neighbouring losses, as "step:loss step:loss ..."."""
    width = max(1, -(-len(losses) // CURVE_POINTS))
    spans = [losses[i : i + width] for i in range(0, len(losses), width)]
    return " ".join(f"{i * width + len(s)}:{sum(s) / len(s):.4f}" for i, s in enumerate(spans))


def train(
    task: Task,
    optimizer: torch.optim.Optimizer,
    seed: int,
    deadline: float,
    look: Callable[[int], None] = lambda step: None,
) -> tuple[Progress, bool]:
    """The steps of a run; (losses, whether it diverged, which ends it early).

    look: called with a step's number when its gradients are there. Raises OutOfTimeError after ``deadline``,
    a time.monotonic().
    """
    recipe, progress = task.recipe, Progress(task.recipe.diverged)
    for step in range(recipe.steps):
        torch.manual_seed((seed * 1_000_003 + step) % 2**31)  # of dropout; whatever an optimizer drew
        loss = task.gradients(seed, step)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        look(step)
        optimizer.step()
        progress.add(loss)
        if (step + 1) % CHECK_EVERY == 0 or step + 1 == recipe.steps:
            if progress.diverged():
                return progress, True
            if time.monotonic() > deadline:
                raise OutOfTimeError
    return progress, False


def run_cell(task: Task, arm: str, seed: int, deadline: float = math.inf) -> dict[str, Any]:
    """Train and evaluate; the row of the results."""
    begin, recipe = time.perf_counter(), task.recipe
    weights = task.begin(seed)
    assert task.model is not None
    order = hashlib.sha256()
    for step in range(recipe.steps):
        order.update(np.ascontiguousarray(task.order(seed, step)).tobytes())
    optimizer = make_optimizer(arm, task.model, **recipe.options())
    started = time.perf_counter()
    progress, diverged = train(task, optimizer, seed, deadline)
    seconds = time.perf_counter() - started
    figures: dict[str, float] = {}
    if not diverged:
        task.model.eval()
        with torch.no_grad(), task.autocast():
            figures = task.evaluate()
    last = progress.losses[-20:]
    return {
        "arm": arm,
        "seed": seed,
        "lr": recipe.lr,
        "diverged": int(diverged),
        "steps": len(progress.losses),
        **{key: f"{value:.6g}" for key, value in figures.items()},
        "train_loss": f"{sum(last) / len(last):.5f}",
        "peak_loss": f"{max(progress.losses[20:] or progress.losses):.4f}",
        "parameters": sum(p.numel() for p in task.parameters()),
        "weights": weights,
        "order": order.hexdigest()[:16],
        "step_ms": f"{1e3 * seconds / len(progress.losses):.2f}",
        "seconds": f"{time.perf_counter() - begin:.1f}",
        "curve": curve(progress.losses),
    }
