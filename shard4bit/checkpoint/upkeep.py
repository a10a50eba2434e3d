"""Step directories: their names, the newest, and the removal of old ones and of dead saves' leftovers."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shard4bit.checkpoint.manifest import NAME
from shard4bit.errors import CheckpointError
from shard4bit.log import log

PREFIX = "step-"
#: A leftover that its owner's machine cannot be asked about is dead if nothing in it changed for so long.
#: A live save waits at most two hours for a rank, and a rank that writes changes its file.
QUIET_SECONDS = 24 * 3600.0

_STEP = re.compile(r"step-(\d{10})")
_HIDDEN = re.compile(r"\.step-\d{10}-([0-9a-f]{8})-[0-9a-f]{8}")


def step_name(step: int) -> str:
    return f"{PREFIX}{step:010d}"


def latest(root: Path) -> Path:
    """The newest complete checkpoint under ``root``; CheckpointError if there is none."""
    try:
        names = sorted(os.listdir(root), reverse=True)
    except OSError as error:
        raise CheckpointError(f"{root} cannot be listed: {error.strerror}") from None
    for name in names:
        if _STEP.fullmatch(name) and (root / name / NAME).is_file():
            return root / name
    raise CheckpointError(f"{root} holds no complete checkpoint ({PREFIX}…/{NAME})")


def machine() -> str:
    """Eight hex digits that tell this machine, since it was started, from others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        boot = ""
    return hashlib.blake2b(f"{socket.gethostname()} {boot}".encode(), digest_size=4).hexdigest()


class Hidden:
    """A fresh hidden directory beside its final place, locked as long as this process lives.

    The lock (flock on the directory itself) ends with the process however it dies, and tells a later save
    whether the directory is a leftover. Until it is locked, ``root`` is, so that nobody judges too early.
    """

    def __init__(self, root: Path, final: Path) -> None:
        self.path = root / f".{final.name}-{machine()}-{uuid.uuid4().hex[:8]}"
        with _locked(root, patience=1.0):
            self.path.mkdir()
            self._lock = _lock(self.path)

    def close(self) -> None:
        """Remove the directory unless it was published, and unlock."""
        if self.path.exists():
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _lock(path: Path) -> int | None:
    """A descriptor that locks a directory; None if another process has the lock or none can be had."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


@contextmanager
def _locked(path: Path, patience: float) -> Iterator[bool]:
    """Whether the lock on a directory could be had within so many seconds; it is held meanwhile."""
    until = time.monotonic() + patience
    while (handle := _lock(path)) is None and time.monotonic() < until:
        time.sleep(0.01)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            os.close(handle)


def remove_leftovers(root: Path, ours: Path) -> None:
    """Remove hidden directories of saves that are surely dead. ``ours`` was just made; its time is the
    file system's now. Never raises."""
    try:
        now = ours.stat().st_mtime
        for name in os.listdir(root):
            match = _HIDDEN.fullmatch(name)
            if match and name != ours.name and not (root / name).is_symlink():
                _remove_if_dead(root / name, match[1], now)
    except OSError as error:
        log.warning("leftovers under %s were not looked at: %s", root, error)


def _remove_if_dead(path: Path, owner: str, now: float) -> None:
    """On our own machine, a directory that nobody has locked. One from elsewhere, if nothing in it changed
    for a day."""
    with _locked(path.parent, patience=1.0) as judging:
        lock = _lock(path)
    if lock is None:  # alive, or not to be told
        return
    try:
        times = [p.stat().st_mtime for p in (path, *path.iterdir())]
        if (judging and owner == machine()) or now - max(times) > QUIET_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
    except OSError:
        pass  # it is being removed by somebody else
    finally:
        os.close(lock)


def remove_old(root: Path, final: Path, keep: int) -> None:
    """Of the checkpoints up to the step of ``final`` keep the newest ``keep``, ``final`` among them.

    Directories that are no checkpoints of ours stay. Failures are logged: the new checkpoint is there.
    """
    try:
        names = sorted(n for n in os.listdir(root) if _STEP.fullmatch(n) and n <= final.name)
        ours = [n for n in names if _is_ours(root / n)]
        for name in ours[:-keep]:
            if name != final.name:
                log.info("removing %s: keep_last=%d", root / name, keep)
                _remove(root / name)
    except OSError as error:
        log.warning("old checkpoints under %s were not all removed: %s", root, error)


def _is_ours(path: Path) -> bool:
    if path.is_symlink() or not (path / NAME).is_file():
        return False
    with open(path / NAME, "rb") as file:
        return file.read(13) == b'{"checksum":"'


def _remove(path: Path) -> None:
    """First out of sight, by one rename, so that a half-removed one is never taken for a checkpoint."""
    hidden = path.with_name(f".{path.name}-{machine()}-{uuid.uuid4().hex[:8]}")
    os.rename(path, hidden)
    shutil.rmtree(hidden)
