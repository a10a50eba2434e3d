"""The kernel back end on the CPU: its own launches, carried out by the emulator."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shard4bit.cuda.backend import KernelBackend
from shard4bit.optim import stepping
from tests.cuda.emulator import ASCENDING, Module
from tests.test_invariance import bits

_LOCK = threading.Lock()  # the emulator runs one launch at a time; simulated ranks are threads


class Graph(TorchDispatchMode):
    """As ``torch.cuda.graph``: what a step does on the device while this is entered, by launches and by
    torch's operations, is done again by ``replay``. (Not done now: launches. torch's operations have to give
    tensors, so they are run now, and replayed into these.)"""

    def __init__(self, runtime: EmulatorRuntime) -> None:
        super().__init__()
        self.runtime, self.work = runtime, list[Callable[[], Any]]()

    def __enter__(self) -> Any:
        self.runtime.graph = self
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        self.runtime.graph = None
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.work.append(lambda: out.copy_(func(*args, **(kwargs or {}))))
        return out

    def replay(self) -> None:
        for act in self.work:
            act()


def _by_value(argument: Any) -> Any:
    """What is in an array now, as a struct; the emulator takes an array itself for an address."""
    if not isinstance(argument, np.ndarray):
        return argument
    return np.void(argument.tobytes())


class EmulatorRuntime:
    """See ``shard4bit.cuda.runtime.Runtime``. ``launches`` records (kernel, thread blocks), ``uploads``
    (bytes). ``graph``: the capture that is going on. room: small, so that tables come in several launches."""

    def __init__(self, order: int = ASCENDING, sanitize: bool = False, room: int = 200) -> None:
        self.device, self.room = torch.device("cpu"), room
        self.order, self.sanitize = order, sanitize
        self.launches: list[tuple[str, int]] = []
        self.uploads: list[int] = []
        self.graph: Graph | None = None

    def capturing(self) -> bool:
        return self.graph is not None

    def prepare(self, source: str, name: str, blocks: int, threads: int, args: tuple[Any, ...]) -> Any:
        assert self.graph is None, "kernels are loaded while capturing"
        return source, name, blocks, threads, args

    def queue(self, launches: Sequence[Any]) -> None:
        for *launch, args in launches:
            run = partial(self.run, *launch, tuple(map(_by_value, args)))
            if self.graph is not None:
                self.graph.work.append(run)
            else:
                run()

    def run(self, source: str, name: str, blocks: int, threads: int, args: tuple[Any, ...]) -> None:
        with _LOCK:
            kernel = Module(source, sanitize=self.sanitize).get_function(name)
            kernel(blocks, threads, args, order=self.order)
            self.launches.append((name, blocks))

    def upload(self, host: np.ndarray) -> torch.Tensor:
        assert self.graph is None, "memory is allocated and filled while capturing"
        flat = host.view(np.uint8).reshape(-1)
        self.uploads.append(flat.size)
        return torch.from_numpy(flat.copy())


def emulated(order: int = ASCENDING, sanitize: bool = False) -> KernelBackend:
    return KernelBackend(EmulatorRuntime(order, sanitize))


@contextmanager
def served_by(backend: Any) -> Iterator[None]:
    """Optimizers' steps on CPU tensors go to this back end."""
    with mock.patch.object(stepping, "backend_for", lambda device: backend):
        yield


class Twins:
    """Two optimizers of the same parameters: one stepped by the reference, the other by a back end.

    make: parameters (or groups, where ``grouped`` turns parameters into them) -> optimizer.
    place: where the second twin's tensors lie (of equal values, in other memory).
    grad_dtype: of all gradients; the parameters' if None.
    """

    def __init__(
        self,
        starts: Sequence[torch.Tensor],
        make: Callable[[list[Any]], Any],
        backend: Any,
        grouped: Callable[[list[Any]], list[Any]] = list,
        place: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
        grad_dtype: torch.dtype | None = None,
    ) -> None:
        self.expected = [torch.nn.Parameter(s.clone()) for s in starts]
        self.found = [torch.nn.Parameter(place(s)) for s in starts]
        for param in self.expected + self.found:
            param.grad_dtype = grad_dtype or param.dtype
        self.reference, self.served = make(grouped(self.expected)), make(grouped(self.found))
        self.backend, self.place = backend, place

    def step(self, grads: Sequence[torch.Tensor | None]) -> None:
        for p, q, grad in zip(self.expected, self.found, grads, strict=True):
            p.grad = None if grad is None else grad.to(p.grad_dtype)
            q.grad = None if p.grad is None else self.place(p.grad)
        self.reference.step()
        with served_by(self.backend):
            self.served.step()

    def differences(self) -> list[tuple[Any, ...]]:
        """(parameter's number, shape, "param" or a state's key) of what does not have the same bits."""
        out = []
        for i, (p, q) in enumerate(zip(self.expected, self.found, strict=True)):
            mine, other = self.served.state[q], self.reference.state[p]
            assert mine.keys() == other.keys()
            pairs = {"param": (p.detach(), q.detach())} | {k: (other[k], mine[k]) for k in other}
            out += [
                (i, tuple(p.shape), k) for k, (a, b) in pairs.items() if not torch.equal(bits(a), bits(b))
            ]
        return out
