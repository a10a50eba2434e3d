"""A save that goes on in a thread while training continues."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from shard4bit.log import log

_current: Saving | None = None  # the last one that was started


class Saving:
    """A handle on a save in the background. The thread is not a daemon: an interpreter that exits waits
    for it."""

    def __init__(self, path: Path, work: Callable[[], None]) -> None:
        self.path = path
        self._error: Exception | None = None
        self._seen = False
        self._work: Callable[[], None] | None = work
        self._thread = threading.Thread(target=self._run, name=f"saving {path.name}")

    def _run(self) -> None:
        assert self._work is not None
        try:
            self._work()
        except Exception as error:
            self._error = error
            log.error("saving %s in the background failed: %s", self.path, error)
        finally:
            self._work = None  # and with it the host copy

    def done(self) -> bool:
        """Whether it has ended, well or badly."""
        return not self._thread.is_alive()

    def wait(self, timeout: float | None = None) -> Path:
        """Wait until the checkpoint is published and return its path. Not collective.

        Raises CheckpointError if the save failed, on every rank alike; TimeoutError after ``timeout``
        seconds.
        """
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"{self.path} is still being saved after {timeout} seconds")
        self._seen = True
        if self._error is not None:
            raise self._error
        return self.path

    result = wait

    def __repr__(self) -> str:
        state = "failed" if self._error else "done" if self.done() else "being written"
        return f"<Saving {self.path}: {state}>"


def start(path: Path, work: Callable[[], None]) -> Saving:
    """Run ``work`` in a thread; at most one at a time."""
    global _current
    assert _current is None or _current.done()
    _current = Saving(path, work)
    _current._thread.start()
    return _current


def settle() -> None:
    """Wait for the save in flight, if any. Its error stays with its handle."""
    if _current is not None:
        _current._thread.join()


def raise_unseen() -> None:
    """Raise the error of the last save if it failed and nobody has seen that yet. Not collective: some ranks
    may have seen it."""
    if _current is not None and _current._error is not None and not _current._seen:
        _current._seen = True
        raise _current._error
