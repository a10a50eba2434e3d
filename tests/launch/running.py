"""Runs of launch.train for tests: on the ranks of a pool, and as processes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.folders import step_name

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--device", "cpu", "--context", "16", "--batch", "4", "--warmup", "2"]
STEPS = 40  # of the runs that launchers start
TINY = [*SMALL, "--layers", "1", "--heads", "2", "--width", "96"]


def environment(**more: str) -> dict[str, str]:
    """This process's without what launchers set, with the checkout on the path and one thread a rank."""
    ours = {
        k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PMI_", "OMPI_", "TORCHELASTIC"))
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        ours.pop(name, None)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PATH": binaries, "CUDA_VISIBLE_DEVICES": ""}
    return {**ours, **fixed, "DS_ACCELERATOR": "cpu", **more}


def call(*command: str, limit: float = 200, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment(**more), cwd=ROOT, capture_output=True, text=True, timeout=limit
    )


def into(folder: Path, every: int = 4) -> list[str]:
    """The options of a run that saves often, to a folder."""
    return ["--out", str(folder), "--save-every", str(every), "--results", str(folder / "results.json")]


def read(folder: Path) -> dict[str, Any]:
    """The results of a run that was given ``into`` this folder."""
    return json.loads((folder / "results.json").read_text())


class Wish:
    """A Stop whose signal arrives when this rank has been asked ``after`` times."""

    def __init__(self, after: float = float("inf")) -> None:
        self.after, self.asked = after, 0

    @property
    def signum(self) -> int:
        self.asked += 1
        return 15 if self.asked >= self.after else 0


def train(arguments: list[str], stop_rank: int = -1, after: float = float("inf")) -> dict[str, Any]:
    """launch.train's results, on the ranks of the pool that calls this or, outside of one, alone."""
    import torch
    import torch.distributed as dist

    from launch import options
    from launch.cluster import Cluster
    from launch.train import run

    torch.set_num_threads(1)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if world > 1:
        os.environ["LOCAL_RANK"] = str(rank)  # DeepSpeed asks for it
    ranks = Cluster(rank, world, torch.device("cpu"), "gloo" if world > 1 else "none")
    stop: Any = Wish(after if rank == stop_rank else float("inf"))
    return run(options.parse(arguments), ranks, stop)


def fails(arguments: list[str]) -> str:
    """The message of the ValueError that a run ends with."""
    try:
        train(arguments)
    except ValueError as error:
        return str(error)
    raise AssertionError("it did not fail")


def until(condition: Callable[[], Any], limit: float = 200, say: Callable[[], str] = str) -> Any:
    """What ``condition`` returns, as soon as that is true."""
    end = time.monotonic() + limit
    while not (found := condition()):
        assert time.monotonic() < end, f"not so after {limit} s:\n{say()}"
        time.sleep(0.01)
    return found


def _below(pid: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    children = []
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children += [int(word) for word in tasks.read_text().split()]
    return [*children, *(grandchild for child in children for grandchild in _below(child))]


class Started:
    """A launcher that runs beside the test, its words in ``log``. Nothing of it outlives the ``with``."""

    def __init__(self, log: Path, *command: str, **more: str) -> None:
        self.log, self.seen = log, set[int]()
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, env=environment(**more), cwd=ROOT, stdout=file, stderr=file, start_new_session=True
            )

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def ranks(self) -> dict[int, int]:
        """The process of each rank that runs now, by the variables that it was started with."""
        found = {}
        for pid in _below(self.process.pid):
            self.seen.add(pid)
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
                variables = dict(word.partition("=")[::2] for word in words)
                rank = next((variables[n] for n in ("RANK", "PMI_RANK") if n in variables), None)
                if rank is not None and b"\0launch.train\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found[int(rank)] = pid
        return found

    def step(self) -> list[int]:
        """The processes of a step of SLURM: all that srun has started."""
        return [pid for pid in _below(self.process.pid) if _is_ours(pid, b"launch.train", b"torchrun")]

    def saves(self, out: Path, step: int) -> None:
        """Wait until a run has saved after so many steps."""
        path = out / "checkpoints" / step_name(step)

        def there() -> bool:
            assert self.process.poll() is None, self.said
            return path.exists()

        until(there, say=lambda: self.said)
        self.ranks()

    def ends(self, limit: float = 200) -> int:
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it runs after {limit} s:\n{self.said}") from None

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *exception: object) -> None:
        for pid in {*self.seen, *_below(self.process.pid), self.process.pid}:
            if pid == self.process.pid or _is_ours(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait(10)


def _is_ours(pid: int, *words: bytes) -> bool:
    """Whether a process that was seen earlier is still a launcher or a rank: numbers are used again."""
    with contextlib.suppress(OSError):
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
        return b"python" in line.split(b"\0")[0] and any(word in line for word in words or [b"launch"])
    return False
