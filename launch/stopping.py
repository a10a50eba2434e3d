"""A graceful stop: SIGTERM or SIGINT on any rank ends the run after a step, the same one on all.

And whether this is the same run again, after it was stopped or lost a rank."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PATIENCE = 5.0  # seconds in which more signals are the same wish: a terminal and torchrun both send Ctrl-C

#: how often torchrun started the ranks again, and SLURM the job
AGAIN = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


def restarted() -> bool:
    """Whether a launcher started this process in place of an earlier one of the same run.

    Ranks may differ: the torchrun of each node counts only the failures of its own ranks.
    """
    return any(int(os.environ.get(name) or 0) > 0 for name in AGAIN)


class Stop:
    """Notes the first of the signals. Another one later ends the process as if nobody had listened.

    signum: what arrived at this rank, or 0.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._since = 0.0
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.signum:
            self.signum, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > PATIENCE:
            self.forget()
            signal.raise_signal(number)

    def forget(self) -> None:
        """Handle the signals as before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
