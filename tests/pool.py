"""Persistent gloo process pools for tests: one per world size, because a fresh spawn costs seconds."""

from __future__ import annotations

import atexit
import datetime
import faulthandler
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

TIMEOUT = 120.0  # seconds for one call on all ranks


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _serve(rank: int, world: int, port: int, pipe: Any, log: str) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)  # what a dying process says
    faulthandler.enable()
    import torch
    import torch.distributed as dist

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


class Pool:
    """``run(function, *args)`` calls a module-level function on every rank; results in rank order."""

    def __init__(self, world: int) -> None:
        context, port = get_context("spawn"), free_port()
        self.pipes, self.processes = [], []
        self.logs = tempfile.TemporaryDirectory(prefix=f"pool-{world}-")
        for rank in range(world):
            ours, theirs = context.Pipe()
            args = (rank, world, port, theirs, self._log(rank))
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

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

    def _death(self, rank: int, name: str) -> AssertionError:
        self.processes[rank].join(10)
        code = self.processes[rank].exitcode
        with open(self._log(rank), errors="replace") as log:
            words = log.read()[-20_000:]
        self.close()
        return AssertionError(f"rank {rank} died in {name} with exit code {code}; its stderr ended:\n{words}")

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        outcomes = self.outcomes(function, *args)
        for rank, outcome in enumerate(outcomes):
            if outcome[0] == "error":
                raise AssertionError(f"rank {rank}:\n{outcome[2]}") from outcome[1]
        return [outcome[1] for outcome in outcomes]

    def close(self) -> None:
        for process in self.processes:
            process.kill()


_POOLS: dict[int, Pool] = {}


def pool(world: int) -> Pool:
    """The pool of a world size; restarted if a test broke it."""
    known = _POOLS.get(world)
    if known is None or not all(p.is_alive() for p in known.processes):
        _POOLS[world] = Pool(world)
    return _POOLS[world]


@atexit.register
def _close_all() -> None:
    for known in _POOLS.values():
        known.close()
