"""Persistent gloo process pools for tests: one per world size, because a fresh spawn costs seconds."""

from __future__ import annotations

import atexit
import datetime
import faulthandler
import os
import socket
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 120.0  # seconds for one call on all ranks
# What ranks import, which takes each of them some 5 s of a core.
PRELOADED = [
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "deepspeed",
    "shard4bit.fsdp",
    "shard4bit.deepspeed",
]


def starter() -> Any:
    """Where processes come from: a server that has imported it all once, and forks them.

    Where there are GPUs they start afresh: CUDA does not survive a fork, should an import have touched it.
    """
    if torch.cuda.is_available():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _serve(rank: int, world: int, port: int, pipe: Any, log: str) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)  # what a dying process says
    faulthandler.enable()
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    url = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=url, rank=rank, world_size=world, timeout=timeout)
    while True:
        call = pipe.recv()
        if call is None:
            os._exit(0)  # gloo sometimes aborts in an ordinary exit
        function, args = call
        try:
            pipe.send(("ok", function(*args)))
        except BaseException as error:
            try:
                pipe.send(("error", error, traceback.format_exc()))
            except Exception:
                pipe.send(("error", RuntimeError(str(error)), traceback.format_exc()))


class RankDied(AssertionError):
    """A process of a pool ended while it was called; ``code`` is its exit code, negative for a signal."""

    def __init__(self, code: int | None, text: str) -> None:
        super().__init__(text)
        self.code = code


class Pool:
    """``run(function, *args)`` calls a module-level function on every rank; results in rank order.

    A call in which a rank was killed by a signal is repeated once, with a warning that has the rank's
    stderr: gloo aborts now and then (once in some thousand calls). What dies again is an error.
    """

    def __init__(self, world: int, setup: Callable[[], None] | None = None) -> None:
        """setup: what every rank calls first, also when the pool has to start again."""
        self.world, self.setup = world, setup
        self.logs = tempfile.TemporaryDirectory(prefix=f"pool-{world}-")
        self._start()

    def _start(self) -> None:
        context, port = starter(), free_port()
        self.pipes, self.processes = [], []
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            args = (rank, self.world, port, theirs, self._log(rank))
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        if self.setup is not None:
            self._results(self.outcomes(self.setup))

    def _log(self, rank: int) -> str:
        return os.path.join(self.logs.name, f"rank-{rank}.txt")

    def outcomes(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Per rank ("ok", result) or ("error", exception, traceback)."""
        for pipe in self.pipes:
            pipe.send((function, args))
        out = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(TIMEOUT):
                self.close()
                raise TimeoutError(f"rank {rank} did not answer {function.__name__} in {TIMEOUT} s")
            try:
                out.append(pipe.recv())
            except EOFError:
                raise self._death(rank, function.__name__) from None
        return out

    def _death(self, rank: int, name: str) -> RankDied:
        self.processes[rank].join(10)
        code = self.processes[rank].exitcode
        with open(self._log(rank), errors="replace") as log:
            words = log.read()[-20_000:]
        self.close()
        return RankDied(code, f"rank {rank} died in {name} with exit code {code}; its stderr ended:\n{words}")

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        try:
            outcomes = self.outcomes(function, *args)
        except RankDied as death:
            if death.code is None or death.code >= 0:
                raise
            warnings.warn(str(death), stacklevel=2)
            self._start()
            outcomes = self.outcomes(function, *args)
        return self._results(outcomes)

    def _results(self, outcomes: list[Any]) -> list[Any]:
        for rank, outcome in enumerate(outcomes):
            if outcome[0] == "error":
                raise AssertionError(f"rank {rank}:\n{outcome[2]}") from outcome[1]
        return [outcome[1] for outcome in outcomes]

    def close(self) -> None:
        for process in self.processes:
            process.kill()


_POOLS: dict[tuple[int, Callable[[], None] | None], Pool] = {}


def pool(world: int, setup: Callable[[], None] | None = None) -> Pool:
    """The pool of a world size and set-up; restarted if a test broke it."""
    known = _POOLS.get((world, setup))
    if known is None or not all(p.is_alive() for p in known.processes):
        _POOLS[world, setup] = Pool(world, setup)
    return _POOLS[world, setup]


@atexit.register
def _close_all() -> None:
    for known in _POOLS.values():
        known.close()
