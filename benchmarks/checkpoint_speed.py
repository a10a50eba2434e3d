"""Seconds and bytes of checkpoints beside torch's own: python -m benchmarks.checkpoint_speed

An FSDP2 model of 0.29 B parameters (fp32) on 2 gloo ranks of this machine. AdamW4bit's moments by
shard4bit.save and load (parameters=False) against AdamW's by torch.distributed.checkpoint and by torch.save
(a file per rank, fsynced), and the same with parameters. "Copied": every rank copies its file of such a
checkpoint, which lies in the page cache, and fsyncs the copy. "The same bytes": a rank writes as many from
one buffer, fsyncs, and reads them into it. Loads find the files in the page cache. Medians.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import shard4bit
from benchmarks.shapes import llama

WORLD = 2
WAYS = ("ours", "copied", "floor", "dcp", "torch_save")


class Shapes(nn.Module):
    """Parameters without a forward."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        shapes = llama(layers=layers, width=width, kv=width // 4, mlp=11 * width // 4, vocab=32000)
        for i, shape in enumerate(shapes):
            self.register_parameter(f"p{i}", nn.Parameter(torch.empty(shape).normal_(0, 0.02)))


def local_of(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def filled(tensor: torch.Tensor) -> torch.Tensor:
    """Local memory of a (D)Tensor, filled: codes and statistics of any value are as good to copy."""
    raw = local_of(tensor).detach().view(-1).view(torch.uint8)
    raw.copy_(torch.arange(raw.numel(), dtype=torch.int32) % 63)
    return tensor


def forget(path: Path) -> None:
    """Drop what the system has cached of a file that is on disk."""
    handle = os.open(path, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


@dataclass
class Way:
    name: str
    save: Callable[[Path], Any]
    load: Callable[[Path], Any] = lambda place: None


class Bench:
    """On one rank."""

    def __init__(self, root: Path, layers: int, width: int, repeat: int, cold: bool) -> None:
        self.root, self.repeat, self.cold = root, repeat, cold
        model = Shapes(layers, width)
        fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
        self.model: Any = model
        self.optimizer = shard4bit.fsdp.wrap(model, shard4bit.AdamW4bit, lr=1e-3)
        self.optimizer.bind()
        for param in model.parameters():
            for key, tensor in self.optimizer.state[param].items():
                if key != "step":
                    filled(tensor)
        self.numel = sum(p.numel() for p in model.parameters())
        self.params = dict(model.named_parameters())

    @cached_property
    def moments(self) -> dict[str, torch.Tensor]:
        """AdamW's."""
        names = [(n, m) for n in self.params for m in ("exp_avg", "exp_avg_sq")]
        return {f"{n}.{m}": filled(torch.empty_like(self.params[n].detach())) for n, m in names}

    def timed(self, work: Callable[[], Any]) -> float:
        dist.barrier()
        start = time.perf_counter()
        work()
        dist.barrier()
        return time.perf_counter() - start

    def once(self, way: Way) -> tuple[float, float, int]:
        """Seconds to save and to load, and bytes on disk."""
        place = self.root / "checkpoint"
        if dist.get_rank() == 0:
            place.mkdir()
            os.sync()
        saving = self.timed(lambda: way.save(place))
        size = sum(p.stat().st_size for p in place.rglob("*") if p.is_file())
        if self.cold:
            for path in place.rglob("*"):
                if path.is_file():
                    forget(path)
        loading = self.timed(lambda: way.load(place))
        if dist.get_rank() == 0:
            shutil.rmtree(place)
        return saving, loading, size

    def table(self, ways: list[Way]) -> None:
        """Print a line each. They take turns, so that all meet the same disk and memory; the first round
        warms up."""
        seen = [[self.once(way) for way in ways] for _ in range(self.repeat + 1)][1:]
        for way, *rounds in zip(ways, *seen, strict=True):
            s, r, size = (statistics.median(values) for values in zip(*rounds, strict=True))
            if dist.get_rank() == 0:
                cells = f"{size / 1e6:,.0f} MB | {s:.2f} s | {r:.2f} s | {s + r:.2f} s"
                print(f"| {way.name} | {cells} |", flush=True)

    def ours(self, parameters: bool) -> Way:
        def save(place: Path) -> None:
            shard4bit.save(place, self.model, self.optimizer, step=1, parameters=parameters)

        def load(place: Path) -> None:
            shard4bit.load(place, self.model, self.optimizer)

        return Way("shard4bit", save, load)

    def copied(self, parameters: bool) -> Way:
        """Ours, copied."""
        original = self.root / f"original-{parameters}"
        path = shard4bit.save(original, self.model, self.optimizer, step=1, parameters=parameters)
        mine = sorted(path.glob("*.safetensors"))[dist.get_rank()]

        def save(place: Path) -> None:
            with open(mine, "rb", buffering=0) as source, open(place / mine.name, "wb", buffering=0) as copy:
                shutil.copyfileobj(source, copy, 4 << 20)
                os.fsync(copy.fileno())

        return Way("its files, copied", save)

    def dcp(self, parameters: bool) -> Way:
        tensors = {**self.moments, **(self.params if parameters else {})}
        return Way(
            "AdamW, torch.distributed.checkpoint",
            lambda place: dcp.save(dict(tensors), checkpoint_id=place),
            lambda place: dcp.load(dict(tensors), checkpoint_id=place),
        )

    def torch_save(self, parameters: bool) -> Way:
        tensors = {**self.moments, **(self.params if parameters else {})}
        local = {name: local_of(t.detach()) for name, t in tensors.items()}
        name = f"{dist.get_rank()}.pt"

        def save(place: Path) -> None:
            with open(place / name, "wb") as file:
                torch.save(local, file)
                file.flush()
                os.fsync(file.fileno())

        def load(place: Path) -> None:
            for key, value in torch.load(place / name, weights_only=True).items():
                local[key].copy_(value)

        return Way("AdamW, torch.save per rank", save, load)

    def floor(self, parameters: bool) -> Way:
        """As many bytes as ours."""
        tensors = [t for p in self.params.values() for k, t in self.optimizer.state[p].items() if k != "step"]
        tensors += list(self.params.values()) if parameters else []
        local = list(map(local_of, tensors))
        buffer = np.ones(sum(t.numel() * t.element_size() for t in local), np.uint8)

        def save(place: Path) -> None:
            with open(place / str(dist.get_rank()), "wb", buffering=0) as file:
                for start in range(0, len(buffer), 4 << 20):
                    file.write(buffer[start : start + (4 << 20)].data)
                os.fsync(file.fileno())

        def load(place: Path) -> None:
            with open(place / str(dist.get_rank()), "rb", buffering=0) as file:
                for start in range(0, len(buffer), 4 << 20):
                    file.readinto(buffer[start : start + (4 << 20)].data)

        return Way("the same bytes, written and read", save, load)


def rank_main(
    rank: int, port: int, root: str, layers: int, width: int, repeat: int, cold: bool, ways: list[str]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    bench = Bench(Path(root), layers, width, repeat, cold)
    for parameters in (False, True) if width == 1024 else (False,):
        if rank == 0:
            what = "moments and parameters" if parameters else "moments alone"
            print(f"\n{what} of {bench.numel / 1e9:.2f} B parameters, {WORLD} ranks:\n")
            print("| | bytes | save | load | both |\n|---|---|---|---|---|")
        bench.table([getattr(bench, way)(parameters) for way in ways])
    dist.barrier()
    os._exit(0)  # gloo sometimes aborts in an ordinary exit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--width", type=int, default=1024, help="of the model (1024: 0.29 B parameters)")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before loads")
    parser.add_argument("--ways", default=",".join(WAYS), help="which of these, and in which order")
    parser.add_argument("--root", default=None, help="where to write (default: the temporary directory)")
    args = parser.parse_args()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(dir=args.root) as root:
        settings = (port, root, args.layers, args.width, args.repeat, args.cold, args.ways.split(","))
        mp.spawn(rank_main, settings, nprocs=WORLD)


if __name__ == "__main__":
    main()
