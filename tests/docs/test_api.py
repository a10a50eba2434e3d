"""docs/api.md is what tools/make_api.py makes of the docstrings."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT

PROGRAM = "import pathlib, runpy, sys; made = runpy.run_path(sys.argv[1]); "
PROGRAM += "pathlib.Path(sys.argv[2]).write_text(made['page'](), encoding='utf-8')"


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="the page documents the DeepSpeed adapter, which imports DeepSpeed; it is not installed",
)
def test_the_page_is_up_to_date(tmp_path: Path) -> None:
    """In a process of its own: torch changes an optimizer's class when the first one is made."""
    command = [sys.executable, "-c", PROGRAM, str(ROOT / "tools" / "make_api.py"), str(tmp_path / "api.md")]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120, capture_output=True)
    expected = (tmp_path / "api.md").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert page == expected, "run python tools/make_api.py"
