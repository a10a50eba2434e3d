"""docs/api.md is what tools/make_api.py makes of the docstrings."""

from __future__ import annotations

import importlib.util
import runpy

import pytest

from tests.docs.blocks import ROOT


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="the page has DeepSpeed's part")
def test_the_page_is_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "tools" / "make_api.py"))
    page = made["PAGE"].read_text(encoding="utf-8")
    assert page == made["page"](), "run python tools/make_api.py"
