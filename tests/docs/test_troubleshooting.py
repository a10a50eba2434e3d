"""The messages that docs/troubleshooting.md quotes are messages of the library."""

from __future__ import annotations

import ast
import re
from functools import lru_cache

import pytest

from tests.docs.blocks import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
NOT_MESSAGES = {"step()", "strict=False"}


@lru_cache(maxsize=1)
def messages() -> str:
    """Every string of the library's source, with … for what is filled in."""
    found = []
    for path in sorted((ROOT / "shard4bit").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def quoted() -> list[str]:
    """What stands in backticks in the first column."""
    rows = [r for r in PAGE.read_text(encoding="utf-8").splitlines() if r.startswith("| ")]
    return [q for row in rows for q in re.findall(r"`([^`]+)`", row.split(" | ")[0]) if q not in NOT_MESSAGES]


@pytest.mark.parametrize("words", quoted())
def test_the_library_says_so(words: str) -> None:
    pattern = ".*".join(map(re.escape, words.split("…")))
    assert re.search(pattern, messages()), f"no message of shard4bit has the words {words!r}"


def test_many_are_quoted() -> None:
    assert len(quoted()) > 25
