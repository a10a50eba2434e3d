"""Messages through logging's "shard4bit". Silent unless the program sets logging up, but for warnings.

With several ranks a message says its rank; of INFO only the first rank's are let through, unless DEBUG is on.
"""

from __future__ import annotations

import logging

import torch.distributed as dist


class _Ranked(logging.Filter):
    """Adds ``record.rank``."""

    def filter(self, record: logging.LogRecord) -> bool:
        grouped = dist.is_available() and dist.is_initialized()
        rank = record.__dict__["rank"] = dist.get_rank() if grouped else 0
        if grouped and dist.get_world_size() > 1:
            if rank and record.levelno <= logging.INFO and not log.isEnabledFor(logging.DEBUG):
                return False
            record.msg = f"rank {rank}: {record.msg}"
        return True


log = logging.getLogger("shard4bit")
log.addFilter(_Ranked())
