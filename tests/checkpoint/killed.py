"""``python -m tests.checkpoint.killed ROOT TRIALS SEED``: ranks that save step after step are killed
(SIGKILL) in mid-save, over and over; after each time the newest checkpoint must be whole.

A server imports torch once and forks the ranks of every trial. Prints what it saw as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from shard4bit.checkpoint import store
from shard4bit.checkpoint.manifest import Manifest
from shard4bit.checkpoint.pieces import Piece, Rect
from shard4bit.checkpoint.ranks import own_group
from shard4bit.checkpoint.verify import verify
from shard4bit.errors import CheckpointError
from tests.checkpoint import many

WORLD = 2
EVENTS = (
    "open",
    "os.rename",
    "os.mkdir",
    "os.listdir",
    "os.remove",
    "os.rmdir",
    "shutil.rmtree",
    "os.scandir",
)
KEPT = 2


def values(step: int) -> many.Matrices:
    """What a checkpoint of this step holds."""
    a = torch.arange(64.0 * 1000).view(64, 1000)
    return {"a": a + step, "b": torch.full((9, 3), step, dtype=torch.int64)}


def pieces(step: int, rank: int) -> list[Piece]:
    out = []
    for key, value in values(step).items():
        rows, cols = value.shape
        out.append(many.piece(key, value, Rect(rows * rank // WORLD, rows * (rank + 1) // WORLD, 0, cols)))
    return out


def save(root: Path, step: int, rank: int, later: bool) -> None:
    content = {"parameters": True, "frozen": True, "optimizer": False}
    about = Manifest(step, WORLD, {}, {}, {}, [], content)
    if later:
        store.write_later(root, pieces(step, rank), about, keep_last=KEPT).wait()
    else:
        store.write(root, pieces(step, rank), about, keep_last=KEPT)


def die_at(countdown: int, root: Path) -> None:
    """Kill this process at its n-th touch of the file system (below root) from now."""
    left = [countdown]

    def touch(*_: Any) -> None:
        left[0] -= 1
        if left[0] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, args: Any) -> None:
        if event in EVENTS and args and str(root) in str(args[0]):
            touch()

    real = os.fsync
    os.fsync = lambda handle: (touch(), real(handle), touch())[1]  # type: ignore
    sys.addaudithook(hook)


def rank_main(root: Path, rank: int, rendezvous: Path, first: int, countdown: int, ready: int) -> None:
    """Save for ever."""
    group = dist.FileStore(str(rendezvous), WORLD)
    dist.init_process_group("gloo", store=group, rank=rank, world_size=WORLD)
    own_group()  # gloo waits long for one that dies while connections are made
    dist.barrier()
    os.write(ready, b"r")
    if countdown:
        die_at(countdown, root)
    for step in range(first, first + 1000):
        save(root, step, rank, later=step % 2 == 1)


def fork(*args: Any) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        rank_main(*args)
    except CheckpointError:
        status = 7  # what the ranks that live on must see
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def trial(root: Path, number: int, rng: random.Random) -> dict[str, Any]:
    """One crash. Returns which ranks were killed, how, and how the others ended."""
    victims = rng.choice([[0], [1], [0, 1]])
    timed = rng.random() < 0.5
    first = int(store.latest(root).name[5:]) + 1
    rendezvous = root.parent / f"rendezvous-{number}"
    ready, signal_ready = os.pipe()
    ranks = []
    for rank in range(WORLD):
        countdown = 0 if timed or rank not in victims else rng.randrange(1, 60)
        ranks.append(fork(root, rank, rendezvous, first, countdown, signal_ready))
    os.close(signal_ready)
    for _ in range(WORLD):
        assert os.read(ready, 1) == b"r"
    os.close(ready)
    if timed:
        time.sleep(rng.uniform(0, 0.15))
        for rank in victims:
            os.kill(ranks[rank], signal.SIGKILL)
    ends = ended(ranks)
    rendezvous.unlink(missing_ok=True)
    return {
        "victims": victims,
        "timed": timed,
        "ends": ends,
        "steps": int(store.latest(root).name[5:]) - first,
    }


def ended(ranks: list[int]) -> list[int]:
    """Exit codes (a signal's number is negative); those who hang are killed and count as 99."""
    out, deadline = [0] * len(ranks), time.monotonic() + 60
    for i, child in enumerate(ranks):
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                out[i] = os.waitstatus_to_exitcode(status)
                break
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                out[i] = 99
                break
            time.sleep(0.002)
    return out


def check(root: Path) -> list[str]:
    """Faults of what is there now."""
    path = store.latest(root)
    faults = verify(path)
    expected = values(int(path.name[5:]))
    found = {key: torch.zeros_like(value) for key, value in expected.items()}
    many.load(root, many.whole(found))
    faults += [f"{path}: {key} differs" for key, value in expected.items() if not found[key].equal(value)]
    complete = [p for p in root.iterdir() if p.name.startswith("step-")]
    for other in complete:
        faults += verify(other) if other != path else []
    return faults


def main(root: Path, trials: int, seed: int) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    rng, seen = random.Random(seed), []
    many.save(root, [pieces(0, rank) for rank in range(WORLD)], step=0)
    for number in range(trials):
        seen.append({**trial(root, number, rng), "faults": check(root)})
    last = int(store.latest(root).name[5:]) + 1
    leftovers = [p.name for p in root.iterdir() if p.name.startswith(".")]
    with mock.patch.object(store, "world", lambda: (0, 1)):
        about = Manifest(last, 1, {}, {}, {}, [], {"parameters": True, "frozen": True, "optimizer": False})
        store.write(root, many.whole(values(last)), about, keep_last=KEPT)
    left = sorted(p.name for p in root.iterdir())
    print(json.dumps({"trials": seen, "leftovers": len(leftovers), "left": left, "last": last}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
