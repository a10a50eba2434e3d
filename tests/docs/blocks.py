"""Fenced blocks of Markdown files. As a program, it runs the Python blocks of pages:

python -m tests.docs.blocks FILE ...
"""

from __future__ import annotations

import os
import sys
import tempfile
import textwrap
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.pool import free_port

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
ALL_PAGES = sorted([*PAGES, *ROOT.glob("C*.md"), *(ROOT / "docs").glob("*/*.md")])


@dataclass(frozen=True)
class Block:
    """A fenced block: language tag, text, and the line of its first line of text."""

    page: Path
    line: int
    tag: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page. Raises ValueError for a fence that is not closed."""
    out: list[Block] = []
    start, tag, lines = 0, "", [""]
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        bare = line.strip()
        if not start and bare.startswith(("```", "~~~")):
            start, tag, lines = number + 1, bare.strip("`~").strip(), []
        elif start and bare in ("```", "~~~"):
            out.append(Block(page, start, tag, textwrap.dedent("\n".join(lines)) + "\n"))
            start = 0
        elif start:
            lines.append(line)
    if start:
        raise ValueError(f"{page}:{start - 1}: this fence is not closed")
    return out


def run(page: Path) -> int:
    """Execute a page's Python blocks in order, in one namespace; returns their number."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    count = 0
    for block in blocks(page):
        if block.tag == "python":
            # blank lines in front, so that a traceback names the page's own line
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            exec(code, namespace)
            count += 1
    return count


def run_alone(page: Path) -> bool:
    """``run`` in a process and an empty folder of its own, as the only rank that torchrun started."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    status = 1
    try:
        rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(rank, MASTER_PORT=str(free_port()))
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            if "import deepspeed\n" in page.read_text(encoding="utf-8"):
                _compile_nothing()
            print(f"{page.relative_to(ROOT)}: ran {run(page)} blocks")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # gloo now and then aborts in an ordinary exit


def _compile_nothing() -> None:
    """Without this, DeepSpeed compiles an operator of collectives first, which takes a while and g++."""
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}


if __name__ == "__main__":
    import torch.distributed.fsdp  # noqa: F401  once for all pages; it takes seconds

    results = [run_alone(Path(argument).resolve()) for argument in sys.argv[1:]]
    sys.exit(not all(results))
