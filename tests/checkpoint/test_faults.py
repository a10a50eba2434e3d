"""Crashes and failing places: every earlier checkpoint stays whole, every rank gets an error."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import shard4bit
import tests
from shard4bit.checkpoint import files, store
from shard4bit.checkpoint.pieces import Piece, Rect
from shard4bit.checkpoint.verify import verify
from shard4bit.errors import CheckpointError
from tests.checkpoint import killed
from tests.checkpoint.test_options import made, steps_in
from tests.pool import pool

HERE = Path(tests.__file__).parent.parent


def crash(root: Path, trials: int, seed: int) -> None:
    command = [sys.executable, "-m", "tests.checkpoint.killed", str(root), str(trials), str(seed)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-5000:]
    seen = json.loads(done.stdout)
    assert len(seen["trials"]) == trials
    for one in seen["trials"]:
        assert one["faults"] == [], one
        assert set(one["ends"]) <= {-9, 7}, one  # killed, or a CheckpointError because another was
        assert -9 in one["ends"], one
    assert any(one["steps"] > 0 for one in seen["trials"])  # saves did complete in between
    # the save after the last crash removed all that the dead had left
    assert seen["leftovers"] <= 2  # of the last crash
    assert seen["left"][-1] == f"step-{seen['last']:010d}" and len(seen["left"]) == killed.KEPT


def test_killed_in_mid_save(tmp_path: Path) -> None:
    crash(tmp_path / "root", 16, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_250_random_moments(tmp_path: Path) -> None:
    crash(tmp_path / "root", 250, seed=2)


# ---- a disk that fails behind the page cache ----------------------------------------------------


@pytest.mark.parametrize("bad", [1, 2, 3])
def test_an_error_that_an_early_flush_met(tmp_path: Path, bad: int) -> None:
    """The system tells it once, so the last fsync would not know."""
    count, piece = 0, Piece("a", (10, 1 << 20), Rect(0, 10, 0, 1 << 20), torch.zeros(10, 1 << 20))

    def flush(handle: int) -> None:
        nonlocal count
        count += 1
        if count == bad:
            raise OSError(5, "Input/output error")

    with (
        mock.patch.object(os, "fdatasync", flush),
        mock.patch.object(files, "FLUSH_BYTES", 4 << 20),
        mock.patch.object(files, "ThreadPoolExecutor", AtOnce),
        pytest.raises(OSError, match="Input/output"),
    ):
        files.write_file(tmp_path / "file", [piece])
    assert count == bad


class AtOnce:
    """A pool whose calls are over when ``submit`` returns."""

    def __init__(self, threads: int) -> None: ...

    def submit(self, function: Any, *args: Any) -> Future[Any]:
        out: Future[Any] = Future()
        try:
            out.set_result(function(*args))
        except OSError as error:
            out.set_exception(error)
        return out

    def shutdown(self) -> None: ...


def test_flushes_in_a_thread(tmp_path: Path) -> None:
    """For real; the file is that of one flush at the end."""
    data = torch.arange(30 << 20, dtype=torch.int32).view(30, -1)
    piece = Piece("a", (30, 1 << 20), Rect(0, 30, 0, 1 << 20), data)
    with mock.patch.object(os, "fdatasync", wraps=os.fdatasync) as flush:
        files.write_file(tmp_path / "one", [piece])
    assert 1 <= flush.call_count <= 7
    with mock.patch.object(files, "FLUSH_BYTES", 1 << 40):
        files.write_file(tmp_path / "two", [piece])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


# ---- places that fail --------------------------------------------------------------------------


def save_where_it_fails(root: str, what: str) -> str:
    """The error's text; the checkpoint before must still load."""
    model, optimizer = made(1, "fsdp")
    shard4bit.save(root, model, optimizer, step=1)
    before = shard4bit.digest(model, optimizer)
    real, limits = store.write_file, resource.getrlimit(resource.RLIMIT_FSIZE)

    def write(path: Path, pieces: Any) -> Any:
        bad = dist.get_rank() == 1
        if what == "file too large" and bad:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            if what == "vanishes before" and bad:
                shutil.rmtree(path.parent, ignore_errors=True)
            found = real(path, pieces)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if what == "vanishes after" and bad:
            shutil.rmtree(path.parent, ignore_errors=True)
        if what == "root vanishes" and bad:
            Path(root).rename(root + "-gone")
        if what == "raises" and bad:
            raise ArithmeticError("a bug")
        return found

    with mock.patch.object(store, "write_file", write), pytest.raises(CheckpointError) as caught:
        shard4bit.save(root, model, optimizer, step=2)
    dist.barrier()
    if what == "root vanishes" and dist.get_rank() == 0:
        Path(root + "-gone").rename(root)
    dist.barrier()
    fresh, again = made(2, "fsdp")
    assert shard4bit.load(root, fresh, again).step == 1
    assert shard4bit.digest(fresh, again) == before
    return str(caught.value)


WORDS = {
    "file too large": ["rank 1", "File too large"],
    "vanishes before": ["No such file"],
    "vanishes after": ["rank 0", "shared filesystem"],
    "root vanishes": ["rank 0"],
    "raises": ["rank 1", "ArithmeticError", "a bug"],
}


@pytest.mark.parametrize("what", WORDS)
def test_a_place_that_fails(what: str, tmp_path: Path) -> None:
    for text in pool(2).run(save_where_it_fails, str(tmp_path / "root"), what):
        assert all(word in text for word in WORDS[what]), text
    assert steps_in(tmp_path / "root") == [1]
    assert verify(tmp_path / "root" / "step-0000000001") == []
    again = pool(2).run(save_next, str(tmp_path / "root"))
    assert len(set(again)) == 1
    assert sorted(os.listdir(tmp_path / "root")) == ["step-0000000001", "step-0000000002"]


def save_next(root: str) -> str:
    model, optimizer = made(1, "fsdp")
    return str(shard4bit.save(root, model, optimizer, step=2))


def test_the_last_flush_fails(tmp_path: Path) -> None:
    """Of the directory that shows the checkpoint already: it is hidden again and can be saved anew."""
    model, optimizer = made(1)
    real, final, shown = store._fsync_directory, tmp_path / "step-0000000001", []

    def fail(path: Path) -> None:
        if path == tmp_path and final.exists():
            shown.append(verify(final))
            raise OSError(5, "Input/output error")
        real(path)

    with mock.patch.object(store, "_fsync_directory", fail):
        for asynchronous in (False, True):
            with pytest.raises(CheckpointError, match="Input/output error"):
                saved: Any = shard4bit.save(tmp_path, model, optimizer, step=1, asynchronous=asynchronous)
                saved.wait()
            assert os.listdir(tmp_path) == []
    assert shown == [[], []]
    assert shard4bit.save(tmp_path, model, optimizer, step=1) == final


def save_nowhere(root: str) -> str:
    model, optimizer = made(1, "fsdp")
    with pytest.raises(CheckpointError) as caught:
        shard4bit.save(root, model, optimizer, step=2)
    return str(caught.value)


def test_a_place_where_nothing_can_be_written() -> None:
    """/proc takes no directories, even root's."""
    for text in pool(2).run(save_nowhere, "/proc/checkpoints"):
        assert "/proc/checkpoints" in text


RIVAL = """
import sys, torch, shard4bit
from shard4bit.errors import CheckpointError
torch.set_num_threads(1)
model = torch.nn.Linear(96, 96)
optimizer = shard4bit.AdamW4bit(model.parameters())
print("ready", flush=True)
sys.stdin.readline()
won = []
for step in range(40):
    try:
        shard4bit.save(sys.argv[1], model, optimizer, step=step)
        won.append(step)
    except CheckpointError as error:
        assert "exists already" in str(error) or "appeared" in str(error) or "not empty" in str(error), error
print(won, flush=True)
"""


def test_two_jobs_that_save_to_one_place(tmp_path: Path) -> None:
    """Each step is published by one of them, whole."""
    rivals = [
        subprocess.Popen(
            [sys.executable, "-c", RIVAL, str(tmp_path)],
            cwd=HERE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for rival in rivals:
        assert rival.stdout is not None and rival.stdout.readline() == "ready\n"
    for rival in rivals:
        assert rival.stdin is not None
        rival.stdin.write("\n")
        rival.stdin.flush()
    won = [json.loads(rival.communicate(timeout=100)[0]) for rival in rivals]
    assert sorted(won[0] + won[1]) == list(range(40))
    assert steps_in(tmp_path) == list(range(40)) and len(os.listdir(tmp_path)) == 40
    assert all(verify(path) == [] for path in tmp_path.iterdir())
